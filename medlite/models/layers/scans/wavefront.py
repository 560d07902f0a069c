"""The wavefront scan of Mamba2D as one opaque operator, `torch.ops.medlite.wavefront_scan`.

    h_ij = (exp(delta_l A_l) h_i,j-1 + delta_l x B_l + exp(delta_t A_t) h_i-1,j + delta_t x B_t) / 2
    y_ij = C . h_ij + D x

with all operands at pixel i, j: one recurrence over the image, fed from the left (l) and from
the top (t), instead of several over its pixels in a row (Baty and others, "Mamba2D: A Natively
Multi-Dimensional State-Space Model for Vision Tasks", arXiv 2412.16146). On an edge only the
neighbour that exists counts, in full: the left one in the first row (and in the corner, where
it is zero), the upper one in the first column.

All pixels of an anti-diagonal depend on the one before it alone, so that H + W - 1 steps replace
H W. Skewing the rows puts the diagonals in line. All exponents are negative: nothing overflows
for any delta. The work is cut into tiles of samples and states that stay in the cache,
and nothing of the size B H W D N is ever held; the derivative, the same recurrence run
backwards, computes the states anew.

Letters: B batch, H W height and width, D channels, N states; S = H + W - 1 diagonals, K lanes:
B times (H rows, and one of zeros before them). Tiles are (S, N, D, K).
"""

# ruff: noqa: N803, N815, PLR0917 - the letters and the argument order of the paper

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import register_decomposition
from torch.utils.flop_counter import register_flop_formula

LOG2_E = math.log2(math.e)
"""Folded into A because exp2 is several times faster than exp on the CPU."""

TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
"""Elements of a tile: within the last-level cache, or enough to fill a GPU."""

LEFT, TOP = 0, 1
"""The two sources of a state, and how many lanes away each of them is."""


def wavefront_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Scan `x` from its upper left corner; the axis of size 2 is (from the left, from the top).

    Computes in float32 (or float64 where `x` is that), also under autocast.

    Args:
        x: (B, H, W, D) inputs.
        delta: (B, 2, H, W, D) step sizes, not negative (softplus already applied).
        A: (2, D, N) negative decay rates.
        B: (B, 2, H, W, N) input weights.
        C: (B, H, W, N) read-out weights.
        D: (D,) weights of the direct path.

    Returns:
        (B, H, W, D) outputs.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, delta, A, B, C, D = (t if t.dtype == dtype else t.to(dtype) for t in (x, delta, A, B, C, D))
    return torch.ops.medlite.wavefront_scan(x, delta, A, B, C, D)


@torch.library.custom_op("medlite::wavefront_scan", mutates_args=())
def _scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    outputs = x * D
    tiling = _Tiling.choose(x, num_states=A.shape[-1])
    buffers = tiling.new_buffers(x, count=3)
    for samples in tiling.sample_slices():
        front = _Front.cut(x[samples], delta[samples], B[samples], C[samples])
        y = torch.zeros_like(front.delta[LEFT])
        for states in tiling.state_slices():
            tile = front.scan(_rates(A, states), states, buffers)
            y += tile.state.mul_(front.C[:, states, None]).sum(1)
        outputs[samples].add_(_from_lanes(y, x.shape[1:3]))
    return outputs


@torch.library.custom_op("medlite::wavefront_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (delta, B, C)]
    grad_x, grad_A = grad * D, torch.zeros_like(A)
    tiling = _Tiling.choose(x, num_states=A.shape[-1])
    buffers = tiling.new_buffers(x, count=6)
    for samples in tiling.sample_slices():
        front = _Front.cut(x[samples], delta[samples], B[samples], C[samples])
        adjoint = _Adjoint.start(front, grad[samples])
        for states in tiling.state_slices():
            rates = _rates(A, states)
            tile = front.scan(rates, states, buffers)
            by_rates = adjoint.accumulate(front, tile, rates, states, buffers[3:])
            grad_A[..., states].add_(by_rates.transpose(1, 2))
        by_x, *parts = adjoint.finish(x[samples], delta[samples])
        grad_x[samples].add_(by_x)
        for total, part in zip(grads, parts, strict=True):
            total[samples] = part
    return grad_x, grads[0], grad_A, grads[1], grads[2], (grad * x).sum((0, 1, 2))


@_scan.register_fake
def _(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_scan_backward.register_fake
def _(grad: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in operands)


def _save_operands(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.medlite.wavefront_scan_backward(grad, *ctx.saved_tensors)


_scan.register_autograd(_differentiate, setup_context=_save_operands)


@register_decomposition([torch.ops.medlite.wavefront_scan.default], type="pre_autograd")
def _decompose(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Plain operators of torch, diagonal by diagonal; any batch, fixed sides.

    The states of a diagonal are (B, H, N, D).
    """
    weights = edge_weights(x)
    u = _skew((delta * x.unsqueeze(1) * weights.unsqueeze(-1)).permute(0, 2, 3, 1, 4))
    steps, B_steps = _skew(delta.permute(0, 2, 3, 1, 4)), _skew(B.permute(0, 2, 3, 4, 1))
    C_steps, shares = _skew(C.unsqueeze(3)), _skew(weights.amax(0)[None, :, :, None, None])
    batch, height = x.shape[:2]
    state = x.new_zeros(batch, height, A.shape[2], A.shape[1])
    outputs = []
    for s in range(u.shape[2]):
        left, top = torch.exp(steps[:, :, s].unsqueeze(3) * A.mT).unbind(2)
        above = F.pad(state[:, :-1], (0, 0, 0, 0, 1, 0))
        drive = torch.matmul(B_steps[:, :, s], u[:, :, s])
        state = (state * left + above * top) * shares[:, :, s] + drive
        outputs.append(torch.matmul(C_steps[:, :, s], state))
    return _unskew(torch.cat(outputs, 2), x.shape[2]) + D * x


@register_flop_formula(torch.ops.medlite.wavefront_scan)
def _count_flops(x_shape: Any, delta_shape: Any, A_shape: Any, *_: Any, **__: Any) -> int:
    """16 B H W D N + 2 B H W D: a selective scan from each side (9 N + 2), with one read-out."""
    return (16 * A_shape[-1] + 2) * math.prod(x_shape)


def edge_weights(x: Tensor) -> Tensor:
    """(2, H, W) how much the left and the upper neighbour count; their sum is 1.

    Args:
        x: (B, H, W, D) what is scanned.
    """
    height, width = x.shape[1:3]
    is_below = (torch.arange(height, device=x.device) > 0).to(x.dtype).unsqueeze(1)
    is_right = (torch.arange(width, device=x.device) > 0).to(x.dtype)
    top = is_below * (1 - 0.5 * is_right)
    return torch.stack([1 - top, top])


class _Tiling(NamedTuple):
    """How a call is cut: tiles of some samples and some states."""

    batch: int
    num_samples: int
    num_states: int
    tile_states: int

    @classmethod
    def choose(cls, x: Tensor, num_states: int) -> _Tiling:
        batch, height, width, channels = x.shape
        room = TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS["cpu"])
        room //= max((height + width - 1) * (height + 1) * channels, 1)
        samples = min(max(room // num_states, 1), max(batch, 1))
        return cls(batch, samples, num_states, min(max(room // samples, 1), num_states))

    def new_buffers(self, x: Tensor, count: int) -> Tensor:
        """(count, elements of the largest tile); one allocation serves all tiles."""
        _, height, width, channels = x.shape
        lanes = self.num_samples * (height + 1)
        return x.new_empty(count, (height + width - 1) * self.tile_states * channels * lanes)

    def sample_slices(self) -> Iterator[slice]:
        return _slices(self.batch, self.num_samples)

    def state_slices(self) -> Iterator[slice]:
        return _slices(self.num_states, self.tile_states)


class _Tile(NamedTuple):
    """What each pixel keeps of its left and its upper neighbour, and its state (S, N, D, K)."""

    left: Tensor
    top: Tensor
    state: Tensor


class _Front(NamedTuple):
    """The inputs of some samples in line: from (left, top) each, the diagonals outermost."""

    delta: list[Tensor]
    """(S, D, K)"""
    u: list[Tensor]
    """weight delta x (S, D, K)"""
    B: list[Tensor]
    """(S, N, K)"""
    C: Tensor
    """(S, N, K)"""
    log2_share: Tensor
    """(S, 1, K) of the weight of whichever neighbour counts; -inf outside of the image"""

    @classmethod
    def cut(cls, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> _Front:
        weights = edge_weights(x)
        u = delta * x.unsqueeze(1) * weights.unsqueeze(-1)
        shares = weights.amax(0).unsqueeze(-1).expand(x.shape[0], -1, -1, 1)
        deltas, inputs, input_weights = ([_to_lanes(m) for m in t.unbind(1)] for t in (delta, u, B))
        return cls(deltas, inputs, input_weights, _to_lanes(C), _to_lanes(shares).log2())

    def scan(self, rates: Tensor, states: slice, buffers: Tensor) -> _Tile:
        """The states of all pixels, for some N of them with `rates` (2, N, D), in the buffers."""
        left, top, state = tile = _Tile(*_shaped(buffers[:3], self.C, rates.shape[1:]))
        for decay, delta, A in zip((left, top), self.delta, rates * LOG2_E, strict=True):
            share = self.log2_share.unsqueeze(1)
            torch.addcmul(share, delta.unsqueeze(1), A.unsqueeze(-1), out=decay).exp2_()
        torch.mul(self.u[LEFT].unsqueeze(1), self.B[LEFT][:, states, None], out=state)
        state.addcmul_(self.u[TOP].unsqueeze(1), self.B[TOP][:, states, None])
        _advance_(state, left, top)
        return tile


class _Adjoint(NamedTuple):
    """The derivatives of some samples, gathered over tiles.

    The derivative G by h obeys G_ij = dy C + decay_l G_i,j+1 + decay_t G_i+1,j (each decay being
    that of the neighbour), and the one by delta_l A_l is decay_l G_ij h_i,j-1; the same for t.
    """

    grad: Tensor
    """(S, D, K)"""
    grad_u: Tensor
    """(2, S, D, K)"""
    grad_delta: Tensor
    """(2, S, D, K) through the decays alone"""
    grad_B: Tensor
    """(2, S, N, K)"""
    grad_C: Tensor
    """(S, N, K)"""

    @classmethod
    def start(cls, front: _Front, grad: Tensor) -> _Adjoint:
        by_channel, by_state = torch.stack(front.delta), torch.stack(front.B)
        sums = (torch.zeros_like(t) for t in (by_channel, by_channel, by_state, front.C))
        return cls(_to_lanes(grad), *sums)

    def accumulate(
        self, front: _Front, tile: _Tile, rates: Tensor, states: slice, buffers: Tensor
    ) -> Tensor:
        """Add one tile's share; returns the derivative by its rates (2, N, D)."""
        G, product, scratch = _shaped(buffers, front.C, rates.shape[1:])
        grad = self.grad.unsqueeze(1)
        self.grad_C[:, states] = torch.mul(tile.state, grad, out=product).sum(2)
        torch.mul(grad, front.C[:, states, None], out=G)
        _retreat_(G, tile.left, tile.top)
        grad_rates = torch.empty_like(rates)
        for source, decay in ((LEFT, tile.left), (TOP, tile.top)):
            torch.mul(G, front.B[source][:, states, None], out=product)
            self.grad_u[source].add_(product.sum(1))
            torch.mul(G, front.u[source].unsqueeze(1), out=product)
            self.grad_B[source][:, states] = product.sum(2)
            torch.mul(G, decay, out=product)[0] = 0
            num_lanes = product.shape[-1] - source
            product[1:, ..., source:].mul_(tile.state[:-1, ..., :num_lanes])
            torch.mul(product, rates[source].unsqueeze(-1), out=scratch)
            self.grad_delta[source].add_(scratch.sum(1))
            product *= front.delta[source].unsqueeze(1)
            grad_rates[source] = product.sum((0, 3))
        return grad_rates

    def finish(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Derivatives by x (direct path left out), delta, B and C."""
        size, weights = x.shape[1:3], edge_weights(x).unsqueeze(-1)
        by_u, by_decay, by_B = (
            torch.stack([_from_lanes(lanes, size) for lanes in both], 1)
            for both in (self.grad_u, self.grad_delta, self.grad_B)
        )
        by_u *= weights
        by_delta = by_decay.addcmul_(by_u, x.unsqueeze(1))
        return (by_u * delta).sum(1), by_delta, by_B, _from_lanes(self.grad_C, size)


def _advance_(state: Tensor, left: Tensor, top: Tensor) -> None:
    """In place: each state (S, N, D, K) gets what its left and its upper neighbour leave to it."""
    diagonals, lower, upper = (t.unbind(0) for t in (state, state[..., 1:], state[..., :-1]))
    lefts, tops = left.unbind(0), top[..., 1:].unbind(0)
    for s in range(1, len(diagonals)):
        diagonals[s].addcmul_(lefts[s], diagonals[s - 1])
        lower[s].addcmul_(tops[s], upper[s - 1])


def _retreat_(G: Tensor, left: Tensor, top: Tensor) -> None:
    """The derivative of `_advance_`: from the right and the lower neighbour."""
    diagonals, lower, upper = (t.unbind(0) for t in (G, G[..., 1:], G[..., :-1]))
    lefts, tops = left.unbind(0), top[..., 1:].unbind(0)
    for s in range(len(diagonals) - 1, 0, -1):
        diagonals[s - 1].addcmul_(lefts[s], diagonals[s])
        upper[s - 1].addcmul_(tops[s], lower[s])


def _rates(A: Tensor, states: slice) -> Tensor:
    """(2, D, N) -> (2, n, D) of some states."""
    return A[..., states].transpose(1, 2).contiguous()


def _skew(maps: Tensor) -> Tensor:
    """(B, H, W, ...) -> (B, H, S, ...): row i moved i columns to the right, zeros around it."""
    height, width = maps.shape[1:3]
    trailing = (0, 0) * (maps.ndim - 3)
    padded = F.pad(maps, (*trailing, 0, height)).flatten(1, 2)
    return padded[:, :-height].unflatten(1, (height, width + height - 1))


def _unskew(diagonals: Tensor, width: int) -> Tensor:
    """The inverse of `_skew`."""
    height = diagonals.shape[1]
    trailing = (0, 0) * (diagonals.ndim - 3)
    padded = F.pad(diagonals.flatten(1, 2), (*trailing, 0, height))
    return padded.unflatten(1, (height, width + height))[:, :, :width]


def _to_lanes(maps: Tensor) -> Tensor:
    """(B, H, W, F) -> (S, F, K), with a lane of zeros before the first row of each sample."""
    lanes = F.pad(_skew(maps), (0, 0, 0, 0, 1, 0))
    return lanes.permute(2, 3, 0, 1).flatten(2).contiguous()


def _from_lanes(lanes: Tensor, size: tuple[int, ...]) -> Tensor:
    """(S, F, K) -> (B, H, W, F) of the given (H, W)."""
    height, width = size
    diagonals = lanes.unflatten(2, (-1, height + 1))[..., 1:].permute(2, 3, 0, 1)
    return _unskew(diagonals, width)


def _shaped(buffers: Tensor, like: Tensor, inner: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The buffers as tiles (S, *inner, K) of as many steps and lanes as `like` (S, N, K)."""
    shape = (like.shape[0], *inner, like.shape[-1])
    return buffers[:, : math.prod(shape)].view(-1, *shape).unbind(0)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
