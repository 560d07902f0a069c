"""The scan of Mamba-2 as one opaque operator, `torch.ops.medlite.ssd_scan`.

    h_t = exp(delta_t A) h_{t-1} + (delta_t x_t) B_t        y_t = C_t . h_t + D x_t

as in `medlite.models.layers.scans.selective`, but all channels and states of a head share one
step size and one rate. Tokens of a chunk then act on each other through a small matrix, so that
nearly all work is matrix products (Dao and Gu, "Transformers are SSMs: Generalized Models and
Efficient Algorithms Through Structured State Space Duality", arXiv 2405.21060, section 6):

 1. within a chunk, y_t = sum over s <= t of (C_t . B_s) exp(a_{s+1} + ... + a_t) delta_s x_s with
    a = delta A;
 2. each chunk adds its own state, sum over s of exp(a_{s+1} + ... + a_c) delta_s x_s B_s;
 3. the states pass from chunk to chunk, by the same products over blocks of chunks;
 4. the state that enters a chunk is read out by exp(a_1 + ... + a_t) C_t.

Every exponent is a sum of negative terms of its own, never a difference of longer sums: nothing
overflows and nothing cancels, for any delta.

Letters: B batch, P parameter sets, L tokens, D channels, H heads, N states; c tokens of a chunk,
R rows (B times P), G chunks of all rows. Chunks hold time innermost: (G, H, D / H, c).
"""

# ruff: noqa: N803, PLR0917 - the letters and the argument order of the paper

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import register_decomposition
from torch.utils.flop_counter import register_flop_formula

CHUNK = 32
"""Tokens of a chunk, and chunks of a block."""

TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Elements of the matrices between tokens that are held at once, a sample at least."""

LOG2_E = math.log2(math.e)
"""Folded into A because exp2 is several times faster than exp on the CPU."""


def ssd_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Scan `x` with input-dependent steps that the channels of a head share.

    Computes in float32 (or float64 where `x` is that), also under autocast. Scans with
    parameters of their own run side by side where all operands carry the axis P.

    Args:
        x: (B, [P,] L, D) inputs; the first D / H channels are the first head.
        delta: (B, [P,] L, H) step sizes, not negative (softplus already applied).
        A: ([P,] H) negative decay rates.
        B: (B, [P,] L, N) input weights.
        C: (B, [P,] L, N) read-out weights.
        D: ([P,] D) weights of the direct path.

    Returns:
        (B, [P,] L, D) outputs.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, delta, A, B, C, D = (t if t.dtype == dtype else t.to(dtype) for t in (x, delta, A, B, C, D))
    if x.ndim == 4:
        return torch.ops.medlite.ssd_scan(x, delta, A, B, C, D)
    x, delta, B, C = (t.unsqueeze(1) for t in (x, delta, B, C))
    return torch.ops.medlite.ssd_scan(x, delta, A[None], B, C, D[None]).squeeze(1)


@torch.library.custom_op("medlite::ssd_scan", mutates_args=())
def _scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    outputs = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.autocast(x.device.type, enabled=False):
        for tile in _tiles(x, delta):
            chunks = _Chunks.cut(x[tile], delta[tile], A * LOG2_E, B[tile], C[tile], torch.exp2)
            outputs[tile] = chunks.outputs(x[tile].shape)
    return outputs.addcmul_(x, D.unsqueeze(1))


@torch.library.custom_op("medlite::ssd_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        parts = [
            _differentiate_tile(grad[tile], x[tile], delta[tile], A, B[tile], C[tile])
            for tile in _tiles(x, delta)
        ]
    grad_x, grad_delta, grad_A, grad_B, grad_C = (list(part) for part in zip(*parts, strict=True))
    return (
        torch.cat(grad_x).addcmul_(grad, D.unsqueeze(1)),
        torch.cat(grad_delta),
        torch.stack(grad_A).sum(0),
        torch.cat(grad_B),
        torch.cat(grad_C),
        (grad * x).sum((0, 2)),
    )


def _differentiate_tile(
    grad: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The derivatives of some samples by x (direct path left out), delta, A, B and C."""
    chunks = _Chunks.cut(x, delta, A * LOG2_E, B, C, torch.exp2)
    by_u, by_a, by_B, by_C = chunks.backward(grad)
    by_u, by_a = _join(by_u, x.shape).unflatten(-1, (delta.shape[-1], -1)), _join(by_a, delta.shape)
    by_delta = (by_u * x.view_as(by_u)).sum(-1).addcmul_(by_a, A.unsqueeze(1))
    by_x = (by_u * delta.unsqueeze(-1)).view_as(x)
    return by_x, by_delta, (by_a * delta).sum((0, 2)), _join(by_B, B.shape), _join(by_C, C.shape)


@_scan.register_fake
def _(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_scan_backward.register_fake
def _(grad: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in operands)


def _save_operands(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.medlite.ssd_scan_backward(grad, *ctx.saved_tensors)


_scan.register_autograd(_differentiate, setup_context=_save_operands)


@register_decomposition([torch.ops.medlite.ssd_scan.default], type="pre_autograd")
def _decompose(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Plain operators of torch, for formats without a translation; any batch, a fixed length."""
    chunks = _Chunks.cut(x, delta, A, B, C, torch.exp)
    return chunks.outputs(x.shape) + D.unsqueeze(1) * x


@register_flop_formula(torch.ops.medlite.ssd_scan)
def _count_flops(
    x_shape: Any, delta_shape: Any, A_shape: Any, B_shape: Any, *_: Any, **__: Any
) -> int:
    """The matrix products of steps 1, 2 and 4: (2 c (N + D) + 4 N D + 2 D) flops a token."""
    *_batch, length, channels = x_shape
    states, chunk = B_shape[-1], min(CHUNK, length)
    a_token = 2 * chunk * (states + channels) + 4 * states * channels + 2 * channels
    return a_token * math.prod(x_shape[:-1])


class _Chunks(NamedTuple):
    """The inputs of some rows, cut into chunks, with the decay between any two tokens of one."""

    u: Tensor
    """delta x (G, H, D / H, c)"""
    decay: Tensor
    """(G, H, c + 1, c): row 0 from before the chunk, row 1 + s from after token s, to after t"""
    log_decay: Tensor
    """(R, chunks of a row, H) of whole chunks"""
    B: Tensor
    """(G, N, c)"""
    C: Tensor
    """(G, N, c)"""
    exp: Callable[[Tensor], Tensor]
    """torch.exp, or torch.exp2 where the rates are to base 2"""

    @classmethod
    def cut(
        cls,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        exp: Callable[[Tensor], Tensor],
    ) -> _Chunks:
        heads, length = delta.shape[-1], x.shape[2]
        size = min(CHUNK, length)
        a = _cut(delta * A.unsqueeze(1), size)
        u = _cut(x, size).unflatten(1, (heads, -1)) * _cut(delta, size).unsqueeze(2)
        log_decay = a.sum(-1).unflatten(0, (-1, -(-length // size)))
        return cls(u, _decay(a, exp), log_decay, _cut(B, size), _cut(C, size), exp)

    @property
    def scores(self) -> Tensor:
        """B_s . C_t where s <= t, otherwise 0: (G, c, c)."""
        return torch.matmul(self.B.mT, self.C).triu()

    @property
    def to_end(self) -> Tensor:
        """Decay from each token to the end of its chunk, (G, H, 1, c)."""
        return self.decay[:, :, 1:, -1].unsqueeze(2)

    @property
    def from_start(self) -> Tensor:
        """Decay from before the chunk to after each token, (G, H, 1, c)."""
        return self.decay[:, :, :1]

    def entering(self, weighted: Tensor) -> Tensor:
        """The states (G, D, N) before each chunk; `weighted` is u decayed to the end."""
        return _pass_on(self.log_decay, torch.matmul(weighted, self.B.mT), self.exp)

    def leaving(self, weighted: Tensor) -> Tensor:
        """The derivative (G, D, N) by the states after each chunk; the same scan run backwards."""
        chunks = self.log_decay.shape[1]
        by_entering = torch.matmul(weighted, self.C.mT).unflatten(0, (-1, chunks)).flip(1)
        passed = _pass_on(self.log_decay.flip(1), by_entering.flatten(0, 1), self.exp)
        return passed.unflatten(0, (-1, chunks)).flip(1).flatten(0, 1)

    def outputs(self, shape: torch.Size) -> Tensor:
        """Outputs (B, P, L, D) of the given shape, without the direct path."""
        within = torch.matmul(self.u, self.decay[:, :, 1:] * self.scores.unsqueeze(1))
        entering = self.entering((self.u * self.to_end).flatten(1, 2))
        across = torch.matmul(entering, self.C).view_as(within)
        return _join((within + across * self.from_start).flatten(1, 2), shape)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The derivatives by u (G, D, c), by delta A (G, H, c), by B and by C (G, N, c)."""
        size, heads = self.B.shape[-1], self.u.shape[1]
        dy, scores = _cut(grad, size).unflatten(1, (heads, -1)), self.scores
        by_decay = torch.zeros_like(self.decay)
        pairs = torch.matmul(self.u.mT, dy).mul_(self.decay[:, :, 1:])
        by_scores = pairs.sum(1).triu()
        torch.mul(pairs, scores.unsqueeze(1), out=by_decay[:, :, 1:])
        by_u = torch.matmul(dy, (self.decay[:, :, 1:] * scores.unsqueeze(1)).mT)

        u_end, dy_start = (self.u * self.to_end), (dy * self.from_start)
        flat_u, flat_dy = u_end.flatten(1, 2), dy_start.flatten(1, 2)
        entering, leaving = self.entering(flat_u), self.leaving(flat_dy)
        by_u_end = torch.matmul(leaving, self.B).view_as(by_u)
        by_u += by_u_end * self.to_end
        by_decay[:, :, 1:, -1] += (u_end * by_u_end).sum(2)
        by_decay[:, :, 0] = (dy_start * torch.matmul(entering, self.C).view_as(dy)).sum(2)
        shared = (entering * leaving).unflatten(1, (heads, -1)).sum((2, 3))
        by_decay[:, :, 0, -1] += shared * self.decay[:, :, 0, -1]

        by_B = torch.baddbmm(torch.matmul(leaving.mT, flat_u), self.C, by_scores.mT)
        by_C = torch.baddbmm(torch.matmul(entering.mT, flat_dy), self.B, by_scores)
        return by_u.flatten(1, 2), _decay_backward(by_decay), by_B, by_C


def _decay(a: Tensor, exp: Callable[[Tensor], Tensor]) -> Tensor:
    """(G, H, c) -> (G, H, c + 1, c): exp(a_s + ... + a_t), or 1 where that is empty (s > t)."""
    size = a.shape[-1]
    ones = a.new_ones(size + 1, size).triu()
    return exp(torch.matmul(a.unsqueeze(2) * ones, ones[:-1]))


def _decay_backward(grad: Tensor) -> Tensor:
    """The derivative by a from the one by the sums of `_decay`."""
    size = grad.shape[-1]
    ones = grad.new_ones(size + 1, size).triu()
    return torch.matmul(grad, ones[:-1].T).mul_(ones).sum(2)


def _pass_on(log_decay: Tensor, added: Tensor, exp: Callable[[Tensor], Tensor]) -> Tensor:
    """The states before each chunk.

    Args:
        log_decay: (R, K, H) over each of the K chunks of a row.
        added: (R K, D, N) what each chunk adds.
        exp: of the logarithms.

    Returns:
        (R K, D, N).
    """
    chunks = log_decay.shape[1]
    if chunks == 1:
        return torch.zeros_like(added)
    after = _accumulate(log_decay, added.unflatten(0, (-1, chunks)).flatten(2), exp)
    return F.pad(after[:, :-1], (0, 0, 1, 0)).reshape(added.shape)


def _accumulate(log_decay: Tensor, added: Tensor, exp: Callable[[Tensor], Tensor]) -> Tensor:
    """The states after each of K chunks, (R, K, D N): products within blocks, then over them."""
    _, chunks, heads = log_decay.shape
    size = min(CHUNK, chunks)
    a = _cut(log_decay.unsqueeze(1), size)
    decay = _decay(a, exp)
    blocks = _cut(added.unsqueeze(1), size).unflatten(1, (heads, -1))
    after = torch.matmul(blocks, decay[:, :, 1:].triu())
    if chunks > size:
        last = after[..., -1].flatten(1).unsqueeze(2)
        totals = a.sum(-1).unflatten(0, (-1, -(-chunks // size)))
        before = _pass_on(totals, last, exp).view_as(after[..., -1])
        after = after + before.unsqueeze(-1) * decay[:, :, :1]
    shape = (log_decay.shape[0], 1, chunks, added.shape[2])
    return _join(after.flatten(1, 2), torch.Size(shape)).squeeze(1)


def _cut(tokens: Tensor, size: int) -> Tensor:
    """(B, P, L, F) -> (G, F, c), padded with zeros (decay 1, input 0: no effect)."""
    length, features = tokens.shape[2:]
    padded = F.pad(tokens, (0, 0, 0, -length % size)) if length % size else tokens
    return padded.reshape(-1, size, features).mT.contiguous()


def _join(chunks: Tensor, shape: torch.Size) -> Tensor:
    """(G, F, c) -> (B, P, L, F) of the given shape, without the padding."""
    _, sets, length, features = shape
    padded = -(-length // chunks.shape[-1]) * chunks.shape[-1]
    return chunks.mT.reshape(-1, sets, padded, features)[:, :, :length]


def _tiles(x: Tensor, delta: Tensor) -> Iterator[slice]:
    """Slices of the batch whose matrices between tokens stay in the cache."""
    batch, sets, length, heads = delta.shape
    room = TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS["cpu"])
    size = max(room // max(sets * length * heads * CHUNK, 1), 1)
    return (slice(start, start + size) for start in range(0, batch, size))
