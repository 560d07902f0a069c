// The selective scan of Mamba (arXiv 2312.00752, equations 2a-2b) and its derivative as a C++
// programmer would write them for one core: the limit that the portable forms are measured by.
//
// A vector holds one state of 16 channels; the 16 states of 16 channels stay in registers. The
// derivative keeps the state before every 64th step, recomputes one block of steps and walks it
// back, so that nothing has the size B L D N.
//
// Letters: B batch, P parameter sets, L tokens, D channels, N states. Arrays are contiguous:
// x, delta, y (B, P, L, D); A (P, D, N); B, C (B, P, L, N); D (P, D). N is 16.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int N = 16, LANES = 16, STEPS = 64;
constexpr float LOG2_E = 1.44269504088896341f;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
using States = Vector[N];

struct Shape {
    int64_t rows, sets, length, channels;  // rows: B times P
};

// 2^x for x <= 0, zero from 2^-126.5 down. The polynomial is 2^r on [-1/2, 1/2] to 3e-9, one at
// zero.
inline Vector power_of_two(Vector x) {
    x = x < -127.0f ? Vector{} - 127.0f : x;
    const Integers whole = __builtin_convertvector(x - 0.5f, Integers);  // cuts towards zero
    const Vector r = x - __builtin_convertvector(whole, Vector);
    Vector p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
    return p * (Vector)((whole + 127) << 23);
}

inline Vector load(const float* source, int count) {
    Vector result{};
    if (count == LANES) {
        std::memcpy(&result, source, sizeof result);
    } else {
#ifdef __AVX512F__
        result = (Vector)_mm512_maskz_loadu_ps((1 << count) - 1, source);
#else
        for (int i = 0; i < count; ++i) result[i] = source[i];
#endif
    }
    return result;
}

inline void store(float* target, Vector value, int count) {
    if (count == LANES) {
        std::memcpy(target, &value, sizeof value);
    } else {
#ifdef __AVX512F__
        _mm512_mask_storeu_ps(target, (1 << count) - 1, (__m512)value);
#else
        for (int i = 0; i < count; ++i) target[i] = value[i];
#endif
    }
}

// The rates of `count` channels from the first one's row, to base `scale`; zero beyond them.
inline void load_rates(States rates, const float* A, int count, float scale) {
    for (int n = 0; n < N; ++n)
        for (int d = 0; d < LANES; ++d) rates[n][d] = d < count ? A[d * N + n] * scale : 0.0f;
}

// Sums over the lanes of 16 vectors, as one vector.
inline Vector sum_lanes(const States values) {
    const Integers even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const Integers odd = even + 1;
    Vector fold[N];
    std::memcpy(fold, values, sizeof fold);
#pragma GCC unroll 4
    for (int half = N / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
            fold[i] = __builtin_shuffle(fold[2 * i], fold[2 * i + 1], even) +
                      __builtin_shuffle(fold[2 * i], fold[2 * i + 1], odd);
    return fold[0];
}

template <bool IS_WHOLE>
void scan_block(Shape shape, const float* x, const float* delta, const float* A, const float* B,
                const float* C, const float* D, float* y, int lanes) {
    const int count = IS_WHOLE ? LANES : lanes;
    States rates, h{};
    load_rates(rates, A, count, LOG2_E);
    const Vector direct = load(D, count);
    for (int64_t t = 0; t < shape.length; ++t, B += N, C += N) {
        const Vector step = load(delta + t * shape.channels, count);
        const Vector token = load(x + t * shape.channels, count);
        const Vector u = step * token;
        Vector sum = direct * token;
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            h[n] = h[n] * power_of_two(step * rates[n]) + u * B[n];
            sum += h[n] * C[n];
        }
        store(y + t * shape.channels, sum, count);
    }
}

// The derivative of one row (one sample and parameter set), all its channels.
class Derivative {
  public:
    Derivative(Shape shape, const float* grad, const float* x, const float* delta, const float* A,
               const float* B, const float* C, const float* D)
        : shape(shape), grad(grad), x(x), delta(delta), A(A), B(B), C(C), D(D),
          num_groups((shape.channels + LANES - 1) / LANES),
          num_blocks((shape.length + STEPS - 1) / STEPS),
          before(num_groups * num_blocks * N), r(num_groups * N), sum_A(num_groups * N),
          sum_D(num_groups), states(STEPS * N), decays(STEPS * N), lanes_B(STEPS * N),
          lanes_C(STEPS * N) {}

    void run(float* grad_x, float* grad_delta, float* grad_A, float* grad_B, float* grad_C,
             float* grad_D) {
        for (int64_t group = 0; group < num_groups; ++group) keep_states(group);
        for (int64_t block = num_blocks - 1; block >= 0; --block) {
            std::memset(lanes_B.data(), 0, lanes_B.size() * sizeof(Vector));
            std::memset(lanes_C.data(), 0, lanes_C.size() * sizeof(Vector));
            for (int64_t group = 0; group < num_groups; ++group) {
                recompute(group, block);
                walk_back(group, block, grad_x, grad_delta);
            }
            for (int64_t t = begin(block); t < end(block); ++t) {
                store(grad_B + t * N, sum_lanes(&lanes_B[(t - begin(block)) * N]), N);
                store(grad_C + t * N, sum_lanes(&lanes_C[(t - begin(block)) * N]), N);
            }
        }
        for (int64_t d = 0; d < shape.channels; ++d) {
            grad_D[d] += sum_D[d / LANES][d % LANES];
            for (int n = 0; n < N; ++n)
                grad_A[d * N + n] += sum_A[d / LANES * N + n][d % LANES];
        }
    }

  private:
    int64_t begin(int64_t block) const { return block * STEPS; }
    int64_t end(int64_t block) const { return std::min(shape.length, (block + 1) * STEPS); }
    int width(int64_t group) const {
        return std::min<int64_t>(LANES, shape.channels - group * LANES);
    }
    Vector at(const float* tokens, int64_t t, int64_t group) const {
        return load(tokens + t * shape.channels + group * LANES, width(group));
    }

    // The states before every block, by one pass without a read-out.
    void keep_states(int64_t group) {
        States rates, h{};
        load_rates(rates, A + group * LANES * N, width(group), LOG2_E);
        for (int64_t block = 0; block < num_blocks; ++block) {
            std::memcpy(&before[(group * num_blocks + block) * N], h, sizeof h);
            for (int64_t t = begin(block); t < end(block); ++t) {
                const Vector step = at(delta, t, group), u = step * at(x, t, group);
#pragma GCC unroll 16
                for (int n = 0; n < N; ++n)
                    h[n] = h[n] * power_of_two(step * rates[n]) + u * B[t * N + n];
            }
        }
    }

    // Decays and states of all steps of a block; a state stands where its step ends.
    void recompute(int64_t group, int64_t block) {
        States rates, h;
        load_rates(rates, A + group * LANES * N, width(group), LOG2_E);
        std::memcpy(h, &before[(group * num_blocks + block) * N], sizeof h);
        for (int64_t t = begin(block); t < end(block); ++t) {
            const Vector step = at(delta, t, group), u = step * at(x, t, group);
            Vector* decay = &decays[(t - begin(block)) * N];
            Vector* state = &states[(t - begin(block)) * N];
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) {
                decay[n] = power_of_two(step * rates[n]);
                state[n] = h[n] = h[n] * decay[n] + u * B[t * N + n];
            }
        }
    }

    void walk_back(int64_t group, int64_t block, float* grad_x, float* grad_delta) {
        const int count = width(group);
        States rates, from_after;
        load_rates(rates, A + group * LANES * N, count, 1.0f);
        std::memcpy(from_after, &r[group * N], sizeof from_after);
        const Vector direct = load(D + group * LANES, count);
        for (int64_t t = end(block) - 1; t >= begin(block); --t) {
            const int64_t s = t - begin(block);
            const Vector step = at(delta, t, group), token = at(x, t, group);
            const Vector dy = at(grad, t, group), u = step * token;
            const Vector* state = &states[s * N];
            const Vector* previous =
                s > 0 ? state - N : &before[(group * num_blocks + block) * N];
            Vector by_u{}, by_step{};
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) {
                const Vector G = from_after[n] + dy * C[t * N + n];
                lanes_C[s * N + n] += dy * state[n];
                lanes_B[s * N + n] += G * u;
                by_u += G * B[t * N + n];
                from_after[n] = G * decays[s * N + n];
                const Vector q = from_after[n] * previous[n];
                by_step += q * rates[n];
                sum_A[group * N + n] += q * step;
            }
            sum_D[group] += dy * token;
            const int64_t first = t * shape.channels + group * LANES;
            store(grad_x + first, by_u * step + direct * dy, count);
            store(grad_delta + first, by_step + by_u * token, count);
        }
        std::memcpy(&r[group * N], from_after, sizeof from_after);
    }

    Shape shape;
    const float *grad, *x, *delta, *A, *B, *C, *D;
    int64_t num_groups, num_blocks;
    std::vector<Vector> before, r, sum_A, sum_D, states, decays, lanes_B, lanes_C;
};

}  // namespace

extern "C" void scan_forward(int64_t batch, int64_t sets, int64_t length, int64_t channels,
                             const float* x, const float* delta, const float* A, const float* B,
                             const float* C, const float* D, float* y) {
    const Shape shape{batch * sets, sets, length, channels};
    for (int64_t row = 0; row < shape.rows; ++row)
        for (int64_t first = 0; first < channels; first += LANES) {
            const int64_t set = row % sets, tokens = row * length * channels + first;
            const int count = std::min<int64_t>(LANES, channels - first);
            const auto scan = count == LANES ? scan_block<true> : scan_block<false>;
            scan(shape, x + tokens, delta + tokens, A + (set * channels + first) * N,
                 B + row * length * N, C + row * length * N, D + set * channels + first,
                 y + tokens, count);
        }
}

// grad_A and grad_D are added to.
extern "C" void scan_backward(int64_t batch, int64_t sets, int64_t length, int64_t channels,
                              const float* grad, const float* x, const float* delta,
                              const float* A, const float* B, const float* C, const float* D,
                              float* grad_x, float* grad_delta, float* grad_A, float* grad_B,
                              float* grad_C, float* grad_D) {
    const Shape shape{batch * sets, sets, length, channels};
    for (int64_t row = 0; row < shape.rows; ++row) {
        const int64_t set = row % sets, tokens = row * length * channels;
        const int64_t weights = row * length * N, rates = set * channels * N;
        Derivative(shape, grad + tokens, x + tokens, delta + tokens, A + rates, B + weights,
                   C + weights, D + set * channels)
            .run(grad_x + tokens, grad_delta + tokens, grad_A + rates, grad_B + weights,
                 grad_C + weights, grad_D + set * channels);
    }
}
