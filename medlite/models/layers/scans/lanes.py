"""The selective scan as lanes of ATen operations, for any device and precision.

The L tokens are cut into lanes of about sqrt(L) contiguous steps, which advance side by side.
A first pass finds what every lane adds to a zero state, a log-depth scan over the lanes finds
the state that enters each of them, and a second pass starts from there. All exponents are
negative, so nothing overflows for any delta. The derivative is the same scan run backwards.
Samples and states are independent until the read-out, so the work is cut into tiles of them
that stay in the cache: nothing of the size B L D N is ever held.

Letters: B batch, P parameter sets, L tokens, D channels, N states; S steps of a lane, K lanes
times B times P, the lane being the slowest index. Tiles are (S, N, D, K), so that every loop
runs over long rows.
"""

# ruff: noqa: N803, N815, PLR0917 - the letters and the argument order of the paper

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)
"""Folded into A because exp2 is several times faster than exp on the CPU."""

TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
"""Elements of a tile: within the last-level cache, or enough to fill a GPU."""


def forward(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Outputs (B, P, L, D).

    Args:
        x: (B, P, L, D) inputs.
        delta: (B, P, L, D) step sizes, not negative.
        A: (P, D, N) negative decay rates.
        B: (B, P, L, N) input weights.
        C: (B, P, L, N) read-out weights.
        D: (P, D) weights of the direct path.
    """
    outputs = torch.empty_like(x, memory_format=torch.contiguous_format)
    A2 = (A * LOG2_E).permute(2, 1, 0).contiguous()
    tiling = _Tiling.choose(x, num_states=A.shape[-1])
    buffers = tiling.new_buffers(x, count=2)
    for samples in tiling.sample_slices():
        lanes = _Lanes.cut(x[samples], delta[samples], B[samples], tiling.steps)
        C_lanes = _to_lanes(C[samples], tiling.steps)
        y = torch.zeros_like(lanes.x)
        for states in tiling.state_slices():
            tile = lanes.scan(A2[states], states, buffers)
            y += tile.state.mul_(C_lanes[:, states, None]).sum(1)
        outputs[samples] = _to_tokens(y, x[samples].shape)
    return outputs.addcmul_(x, D.unsqueeze(1))


def backward(
    grad: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The derivatives by x, delta, A, B, C and D.

    Args:
        grad: (B, P, L, D) the derivative by the outputs.
        x: as in `forward`, like all others.
        delta: as in `forward`.
        A: as in `forward`.
        B: as in `forward`.
        C: as in `forward`.
        D: as in `forward`.
    """
    At = A.permute(2, 1, 0).contiguous()
    A2 = At * LOG2_E
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, delta, B, C)]
    grad_A = torch.zeros_like(At)
    tiling = _Tiling.choose(x, num_states=A.shape[-1])
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
    grad_x.addcmul_(grad, D.unsqueeze(1))
    grad_D = (grad * x).sum((0, 2))
    return grad_x, grad_delta, grad_A.permute(2, 1, 0).contiguous(), grad_B, grad_C, grad_D


class _Tiling(NamedTuple):
    """How a call is cut: lanes of `steps` tokens, tiles of some samples and some states."""

    steps: int
    batch: int
    num_samples: int
    num_states: int
    tile_states: int

    @classmethod
    def choose(cls, x: Tensor, num_states: int) -> _Tiling:
        batch, sets, length, channels = x.shape
        room = TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS["cpu"])
        room //= max(sets * length * channels, 1)
        samples = min(max(room // num_states, 1), max(batch, 1))
        steps = 2 ** round(math.log2(max(length, 1)) / 2)
        return cls(steps, batch, samples, num_states, min(max(room // samples, 1), num_states))

    def new_buffers(self, x: Tensor, count: int) -> Tensor:
        """(count, elements of the largest tile); one allocation serves all tiles."""
        _, sets, length, channels = x.shape
        padded = -(-length // self.steps) * self.steps
        elements = sets * padded * channels * self.num_samples * self.tile_states
        return x.new_empty(count, elements)

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
    num_rows: int
    """samples times parameter sets: what K holds beside the lanes"""

    @classmethod
    def cut(cls, x: Tensor, delta: Tensor, B: Tensor, steps: int) -> _Lanes:
        x_lanes, delta_lanes = _to_lanes(x, steps), _to_lanes(delta, steps)
        u = x_lanes * delta_lanes
        return cls(x_lanes, delta_lanes, u, _to_lanes(B, steps), x.shape[0] * x.shape[1])

    def scan(self, A2: Tensor, states: slice, buffers: Tensor) -> _Tile:
        """All states (N of them, rates A2 (N, D, P) to base 2) at all steps, in the buffers."""
        rates = self.spread(A2)
        decay, state = _shaped(buffers[:2], self.delta, num_states=A2.shape[0])
        torch.mul(self.delta[:, None], rates, out=decay).exp2_()
        torch.mul(self.u[:, None], self.B[:, states, None], out=state)
        lane_decay = self.delta.sum(0).mul(rates).exp2_()
        entering = _recur_(decay, state, lane_decay, self.num_rows)
        return _Tile(decay, state, lane_decay, entering)

    def spread(self, rates: Tensor) -> Tensor:
        """(N, D, P) -> (N, D, K), or (N, D, 1) where all of K has the same."""
        sets = rates.shape[-1]
        return rates if sets == 1 else rates.repeat(1, 1, self.u.shape[-1] // sets)


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
        """Add one tile's share; returns the derivative by its rates (N, D, P)."""
        G, r, product = _shaped(buffers, lanes.delta, num_states=At.shape[0])
        grad = self.grad[:, None]
        self.grad_C[:, states] = torch.mul(tile.state, grad, out=product).sum(2)
        torch.mul(grad, self.C[:, states, None], out=G)
        torch.mul(G, tile.decay, out=r)
        entering = _recur_(tile.decay, r, tile.lane_decay, lanes.num_rows, is_reversed=True)
        G[:-1] += r[1:]
        G[-1] += entering
        self.grad_B[:, states] = torch.mul(G, lanes.u[:, None], out=product).sum(2)
        self.sum_GB.add_(G.mul_(lanes.B[:, states, None]).sum(1))
        r[1:] *= tile.state[:-1]
        r[0] *= tile.entering
        self.grad_delta.add_(torch.mul(r, lanes.spread(At), out=product).sum(1))
        return r.mul_(lanes.delta[:, None]).sum(0).unflatten(-1, (-1, At.shape[-1])).sum(2)

    def finish(self, lanes: _Lanes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Derivatives by x (direct path left out), delta, B and C, as lanes."""
        grad_delta = self.grad_delta.addcmul_(self.sum_GB, lanes.x)
        return self.sum_GB.mul_(lanes.delta), grad_delta, self.grad_B, self.grad_C


def _recur_(
    decay: Tensor, inputs: Tensor, lane_decay: Tensor, num_rows: int, is_reversed: bool = False
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
    entering = _carry(lane_decay, local, num_rows, is_reversed)
    before = entering
    for a, v in zip(decays, values, strict=True):
        v.addcmul_(a, before)
        before = v
    return entering


def _carry(lane_decay: Tensor, local: Tensor, num_rows: int, is_reversed: bool) -> Tensor:
    """Exclusive scan of `local` over the lanes of (N, D, K), in log2(lanes) steps.

    Hillis and Steele, "Data parallel algorithms", Commun. ACM 29 (1986), 1170-1183.
    """
    if is_reversed:
        return _carry(lane_decay.flip(-1), local.flip(-1), num_rows, False).flip(-1)
    shift = num_rows
    while shift < local.shape[-1]:
        a, h = lane_decay[..., shift:], local[..., shift:]
        joined = torch.addcmul(h, a, local[..., :-shift])
        local = torch.cat([local[..., :shift], joined], -1)
        lane_decay = torch.cat([lane_decay[..., :shift], a * lane_decay[..., :-shift]], -1)
        shift *= 2
    return F.pad(local[..., :-num_rows], (num_rows, 0))


def _to_lanes(tokens: Tensor, steps: int) -> Tensor:
    """(B, P, L, F) -> (S, F, K), padded with zeros (decay 1, input 0: no effect)."""
    batch, sets, length, features = tokens.shape
    padded = F.pad(tokens, (0, 0, 0, -length % steps))
    lanes = padded.reshape(batch * sets, -1, steps, features).permute(2, 3, 1, 0)
    return lanes.contiguous().view(steps, features, -1)


def _to_tokens(lanes: Tensor, shape: torch.Size) -> Tensor:
    """(S, F, K) -> (B, P, L, F) of the given shape, without the padding."""
    batch, sets, length, features = shape
    steps = lanes.shape[0]
    tokens = lanes.view(steps, features, -1, batch * sets).permute(3, 2, 0, 1)
    return tokens.reshape(batch, sets, -1, features)[:, :, :length]


def _shaped(buffers: Tensor, like: Tensor, num_states: int) -> tuple[Tensor, ...]:
    """The buffers as tiles (S, N, D, K) that match `like` (S, D, K)."""
    steps, channels, width = like.shape
    shape = (steps, num_states, channels, width)
    return buffers[:, : math.prod(shape)].view(-1, *shape).unbind(0)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
