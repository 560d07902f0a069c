"""The selective scan of Mamba as one opaque operator, `torch.ops.medlite.selective_scan`.

    h_t = exp(delta_t A) h_{t-1} + (delta_t x_t) B_t        y_t = C_t . h_t + D x_t

(Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
arXiv 2312.00752, equations 2a-2b and algorithm 2.) Export, quantisation, pruning and FLOP
counters see a single node with a derivative; inside, it runs on ATen operations of any device.

The L tokens are cut into lanes of about sqrt(L) contiguous steps, which advance side by side.
A first pass finds what every lane adds to a zero state, a log-depth scan over the lanes finds
the state that enters each of them, and a second pass starts from there. All exponents are
negative, so nothing overflows for any delta. The derivative is the same scan run backwards.
Samples and states are independent until the read-out, so the work is cut into tiles of them
that stay in the cache: nothing of the size B L D N is ever held.

Letters: B batch, L tokens, D channels, N states; S steps of a lane, K lanes times samples,
the lane being the slower index. Tiles are (S, N, D, K), so that every loop runs over long rows.
"""

# ruff: noqa: N803, N815, PLR0917 - the letters and the argument order of the paper

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LOG2_E = math.log2(math.e)
"""Folded into A because exp2 is several times faster than exp on the CPU."""

TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
"""Elements of a tile: within the last-level cache, or enough to fill a GPU."""


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Scan `x` with input-dependent steps; the letters are those of the paper.

    Computes in float32 (or float64 where `x` is that), also under autocast.

    Args:
        x: (B, L, D) inputs.
        delta: (B, L, D) step sizes, not negative (softplus already applied).
        A: (D, N) negative decay rates.
        B: (B, L, N) input weights.
        C: (B, L, N) read-out weights.
        D: (D,) weights of the direct path.

    Returns:
        (B, L, D) outputs.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    operands = [t if t.dtype == dtype else t.to(dtype) for t in (x, delta, A, B, C, D)]
    return torch.ops.medlite.selective_scan(*operands)


@torch.library.custom_op("medlite::selective_scan", mutates_args=())
def _scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    outputs = torch.empty_like(x, memory_format=torch.contiguous_format)
    A2 = (A * LOG2_E).t().contiguous()
    tiling = _Tiling.choose(x, num_states=A.shape[1])
    buffers = tiling.new_buffers(x, count=2)
    for samples in tiling.sample_slices():
        lanes = _Lanes.cut(x[samples], delta[samples], B[samples], tiling.steps)
        C_lanes = _to_lanes(C[samples], tiling.steps)
        y = torch.zeros_like(lanes.x)
        for states in tiling.state_slices():
            tile = lanes.scan(A2[states], states, buffers)
            y += tile.state.mul_(C_lanes[:, states, None]).sum(1)
        outputs[samples] = _to_tokens(y, x[samples].shape)
    return outputs.addcmul_(x, D)


@torch.library.custom_op("medlite::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    At = A.t().contiguous()
    A2 = At * LOG2_E
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, delta, B, C)]
    grad_A = torch.zeros_like(At)
    tiling = _Tiling.choose(x, num_states=A.shape[1])
    buffers = tiling.new_buffers(x, count=5)
    for samples in tiling.sample_slices():
        lanes = _Lanes.cut(x[samples], delta[samples], B[samples], tiling.steps)
        adjoint = _Adjoint.start(lanes, grad[samples], C[samples], tiling.steps)
        for states in tiling.state_slices():
            tile = lanes.scan(A2[states], states, buffers)
            grad_A[states] += adjoint.accumulate(lanes, tile, At[states], states, buffers[2:])
        for total, part in zip(grads, adjoint.finish(lanes), strict=True):
            total[samples] = _to_tokens(part, total[samples].shape)
    grad_x, grad_delta, grad_B, grad_C = grads
    grad_D = (grad * x).sum((0, 1))
    return grad_x.addcmul_(grad, D), grad_delta, grad_A.t().contiguous(), grad_B, grad_C, grad_D


@_scan.register_fake
def _(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_scan_backward.register_fake
def _(
    grad: Tensor,
    *operands: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in operands)


def _save_operands(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.medlite.selective_scan_backward(grad, *ctx.saved_tensors)


_scan.register_autograd(_differentiate, setup_context=_save_operands)


@register_flop_formula(torch.ops.medlite.selective_scan)
def _count_flops(x_shape: Any, delta_shape: Any, A_shape: Any, *_: Any, **__: Any) -> int:
    """9 B L D N + 2 B L D: the count that the Mamba literature uses."""
    return (9 * A_shape[1] + 2) * math.prod(x_shape)


class _Tiling(NamedTuple):
    """How a call is cut: lanes of `steps` tokens, tiles of some samples and some states."""

    steps: int
    batch: int
    num_samples: int
    num_states: int
    tile_states: int

    @classmethod
    def choose(cls, x: Tensor, num_states: int) -> _Tiling:
        batch, length, channels = x.shape
        room = TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS["cpu"]) // max(length * channels, 1)
        samples = min(max(room // num_states, 1), max(batch, 1))
        steps = 2 ** round(math.log2(max(length, 1)) / 2)
        return cls(steps, batch, samples, num_states, min(max(room // samples, 1), num_states))

    def new_buffers(self, x: Tensor, count: int) -> Tensor:
        """(count, elements of the largest tile); one allocation serves all tiles."""
        _, length, channels = x.shape
        padded = -(-length // self.steps) * self.steps
        return x.new_empty(count, padded * channels * self.num_samples * self.tile_states)

    def sample_slices(self) -> Iterator[slice]:
        return _slices(self.batch, self.num_samples)

    def state_slices(self) -> Iterator[slice]:
        return _slices(self.num_states, self.tile_states)


class _Tile(NamedTuple):
    """Decay and state after every step (S, N, D, K); of whole lanes: (N, D, K)."""

    decay: Tensor
    state: Tensor
    lane_decay: Tensor
    entering: Tensor
    """the state before the first step of each lane"""


class _Lanes(NamedTuple):
    """The inputs of some samples as lanes: x, delta, u = delta x (S, D, K), B (S, N, K)."""

    x: Tensor
    delta: Tensor
    u: Tensor
    B: Tensor
    num_samples: int

    @classmethod
    def cut(cls, x: Tensor, delta: Tensor, B: Tensor, steps: int) -> _Lanes:
        x_lanes, delta_lanes = _to_lanes(x, steps), _to_lanes(delta, steps)
        u = x_lanes * delta_lanes
        return cls(x_lanes, delta_lanes, u, _to_lanes(B, steps), x.shape[0])

    def scan(self, A2: Tensor, states: slice, buffers: Tensor) -> _Tile:
        """All states (N of them, rates A2 (N, D) to base 2) at all steps, in the buffers."""
        rates = A2[:, :, None]
        decay, state = _shaped(buffers[:2], self.delta, num_states=A2.shape[0])
        torch.mul(self.delta[:, None], rates, out=decay).exp2_()
        torch.mul(self.u[:, None], self.B[:, states, None], out=state)
        lane_decay = self.delta.sum(0).mul(rates).exp2_()
        entering = _recur_(decay, state, lane_decay, self.num_samples)
        return _Tile(decay, state, lane_decay, entering)


class _Adjoint(NamedTuple):
    """The derivatives of some samples, gathered over tiles.

    With G_t = dy_t C_t + r_{t+1} the derivative by h_t, r_t = a_t G_t and a_t = exp(delta_t A):
    r is the scan of a_t dy_t C_t run backwards, and r_t h_{t-1} the derivative by delta_t A.
    """

    grad: Tensor
    C: Tensor
    sum_GB: Tensor
    """sum over n of G B: the derivative by u = delta x"""
    grad_delta: Tensor
    grad_B: Tensor
    grad_C: Tensor

    @classmethod
    def start(cls, lanes: _Lanes, grad: Tensor, C: Tensor, steps: int) -> _Adjoint:
        zeros, like_B = torch.zeros_like(lanes.u), torch.empty_like(lanes.B)
        sums = (zeros, zeros.clone(), like_B, torch.empty_like(like_B))
        return cls(_to_lanes(grad, steps), _to_lanes(C, steps), *sums)

    def accumulate(
        self, lanes: _Lanes, tile: _Tile, At: Tensor, states: slice, buffers: Tensor
    ) -> Tensor:
        """Add one tile's share; returns the derivative by its rates (N, D)."""
        G, r, product = _shaped(buffers, lanes.delta, num_states=At.shape[0])
        grad = self.grad[:, None]
        self.grad_C[:, states] = torch.mul(tile.state, grad, out=product).sum(2)
        torch.mul(grad, self.C[:, states, None], out=G)
        torch.mul(G, tile.decay, out=r)
        entering = _recur_(tile.decay, r, tile.lane_decay, lanes.num_samples, is_reversed=True)
        G[:-1] += r[1:]
        G[-1] += entering
        self.grad_B[:, states] = torch.mul(G, lanes.u[:, None], out=product).sum(2)
        self.sum_GB.add_(G.mul_(lanes.B[:, states, None]).sum(1))
        r[1:] *= tile.state[:-1]
        r[0] *= tile.entering
        self.grad_delta.add_(torch.mul(r, At[:, :, None], out=product).sum(1))
        return r.mul_(lanes.delta[:, None]).sum((0, 3))

    def finish(self, lanes: _Lanes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Derivatives by x (direct path left out), delta, B and C, as lanes."""
        grad_delta = self.grad_delta.addcmul_(self.sum_GB, lanes.x)
        return self.sum_GB.mul_(lanes.delta), grad_delta, self.grad_B, self.grad_C


def _recur_(
    decay: Tensor, inputs: Tensor, lane_decay: Tensor, num_samples: int, is_reversed: bool = False
) -> Tensor:
    """In place `inputs[s] += decay[s] * inputs[s - 1]` through all lanes of (S, N, D, K).

    Returns:
        (N, D, K) what enters each lane from the ones before it (after it, when reversed).
    """
    direction = -1 if is_reversed else 1
    decays, values = decay.unbind(0)[::direction], inputs.unbind(0)[::direction]
    local = values[0].clone()
    for a, v in zip(decays[1:], values[1:], strict=True):
        torch.addcmul(v, a, local, out=local)
    entering = _carry(lane_decay, local, num_samples, is_reversed)
    before = entering
    for a, v in zip(decays, values, strict=True):
        v.addcmul_(a, before)
        before = v
    return entering


def _carry(lane_decay: Tensor, local: Tensor, num_samples: int, is_reversed: bool) -> Tensor:
    """Exclusive scan of `local` over the lanes of (N, D, K), in log2(lanes) steps.

    Hillis and Steele, "Data parallel algorithms", Commun. ACM 29 (1986), 1170-1183.
    """
    if is_reversed:
        return _carry(lane_decay.flip(-1), local.flip(-1), num_samples, is_reversed=False).flip(-1)
    shift = num_samples
    while shift < local.shape[-1]:
        a, h = lane_decay[..., shift:], local[..., shift:]
        joined = torch.addcmul(h, a, local[..., :-shift])
        local = torch.cat([local[..., :shift], joined], -1)
        lane_decay = torch.cat([lane_decay[..., :shift], a * lane_decay[..., :-shift]], -1)
        shift *= 2
    return F.pad(local[..., :-num_samples], (num_samples, 0))


def _to_lanes(tokens: Tensor, steps: int) -> Tensor:
    """(B, L, F) -> (S, F, K), padded with zeros (decay 1, input 0: no effect)."""
    batch, length, features = tokens.shape
    padded = F.pad(tokens, (0, 0, 0, -length % steps))
    lanes = padded.reshape(batch, -1, steps, features).permute(2, 3, 1, 0)
    return lanes.contiguous().view(steps, features, -1)


def _to_tokens(lanes: Tensor, shape: torch.Size) -> Tensor:
    """(S, F, K) -> (B, L, F) of the given shape, without the padding."""
    batch, length, features = shape
    steps = lanes.shape[0]
    tokens = lanes.view(steps, features, -1, batch).permute(3, 2, 0, 1)
    return tokens.reshape(batch, -1, features)[:, :length]


def _shaped(buffers: Tensor, like: Tensor, num_states: int) -> tuple[Tensor, ...]:
    """The buffers as tiles (S, N, D, K) that match `like` (S, D, K)."""
    steps, channels, width = like.shape
    shape = (steps, num_states, channels, width)
    return buffers[:, : math.prod(shape)].view(-1, *shape).unbind(0)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
