"""The selective scan as lanes of ATen operations, for any device and precision.

The L tokens are cut into lanes of a few contiguous steps, which advance side by side.
A first pass finds what every lane adds to a zero state, a scan over the lanes (again in groups
that advance side by side) finds the state that enters each of them, and a second pass starts
from there. All exponents are negative, so nothing overflows for any delta. The derivative is the
same scan run backwards. Samples and states are independent until the read-out, so the work is
cut into tiles of them, and whatever a step makes is used up while it is in the cache: nothing of
the size B L D N is ever held.

Letters: B batch, P parameter sets, L tokens, D channels, N states; S steps of a lane, J lanes of
a group, G groups, K = B P G J. A front, the states of one step, is (N, D, K), so that loops run
over long rows; a tile (S, N, D, K) has all steps.
"""

# ruff: noqa: N803, N815, PLR0917 - the letters and the argument order of the paper

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)
"""Folded into A because exp2 is several times faster than exp on the CPU."""

FRONT_ELEMENTS = {"cpu": 2**16, "cuda": 2**20}
"""Of a front: several of them within the second-level cache, or enough to fill a GPU."""

LEAST_STEPS = 16
"""Tokens of a lane: enough for the scan over the lanes to cost little, few enough to have many."""

FEW_LANES = 24
"""Up to so many lanes are one group."""


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
    tiling = _Tiling.choose(x, num_states=A.shape[-1])
    tiles = tiling.new_tiles(x, count=1)
    for samples in tiling.sample_slices():
        lanes = _Lanes.cut(x[samples], delta[samples], B[samples], tiling.grid)
        C_lanes = _to_lanes(C[samples], tiling.grid)
        y = torch.zeros_like(lanes.u)
        for states in tiling.state_slices():
            part = _Part.of(lanes, A, states)
            part.read_out(_steps_of_states(C_lanes, states), y.unbind(0), *part.shape(tiles))
        outputs[samples] = _to_tokens(y, tiling.grid, x[samples].shape)
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
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, delta, B, C)]
    grad_A = torch.zeros_like(A)
    tiling = _Tiling.choose(x, num_states=A.shape[-1])
    tiles = tiling.new_tiles(x, count=2)
    for samples in tiling.sample_slices():
        lanes = _Lanes.cut(x[samples], delta[samples], B[samples], tiling.grid)
        adjoint = _Adjoint.start(lanes, grad[samples], C[samples])
        for states in tiling.state_slices():
            part = _Part.of(lanes, A, states)
            by_rate = adjoint.accumulate(part, states, *part.shape(tiles))
            by_set = by_rate.unflatten(-1, (-1, A.shape[0], tiling.grid.num_lanes)).sum((2, 4))
            grad_A[..., states].add_(by_set.permute(2, 1, 0))
        for total, lane in zip(grads, adjoint.finish(lanes), strict=True):
            total[samples] = _to_tokens(lane, tiling.grid, total[samples].shape)
    grad_x, grad_delta, grad_B, grad_C = grads
    grad_x.addcmul_(grad, D.unsqueeze(1))
    return grad_x, grad_delta, grad_A, grad_B, grad_C, (grad * x).sum((0, 2))


class _Grid(NamedTuple):
    """How the tokens are cut: groups of lanes of steps, each a run of neighbours."""

    groups: int
    lanes: int
    """of a group"""
    steps: int

    @property
    def num_lanes(self) -> int:
        return self.groups * self.lanes

    @classmethod
    def choose(cls, length: int, steps: int) -> _Grid:
        steps = min(max(steps, LEAST_STEPS), max(length, 1))
        num_lanes = -(-length // steps)
        lanes = num_lanes if num_lanes <= FEW_LANES else round(math.sqrt(num_lanes))
        return cls(-(-num_lanes // max(lanes, 1)), lanes, steps)


class _Tiling(NamedTuple):
    """How a call is cut: the grid of its tokens, and tiles of some samples and some states."""

    grid: _Grid
    batch: int
    num_samples: int
    num_states: int
    tile_states: int

    @classmethod
    def choose(cls, x: Tensor, num_states: int) -> _Tiling:
        batch, sets, length, channels = x.shape
        room = FRONT_ELEMENTS.get(x.device.type, FRONT_ELEMENTS["cpu"])
        grid = _Grid.choose(length, steps=length * sets * channels // room)
        room //= max(grid.num_lanes * sets * channels, 1)
        samples = min(max(room // num_states, 1), max(batch, 1))
        return cls(grid, batch, samples, num_states, min(max(room // samples, 1), num_states))

    def new_tiles(self, x: Tensor, count: int) -> Tensor:
        """(count, elements of the largest tile); one allocation serves all tiles."""
        rows = self.num_samples * x.shape[1]
        elements = math.prod(self.grid) * rows * x.shape[3] * self.tile_states
        return x.new_empty(count, elements)

    def sample_slices(self) -> Iterator[slice]:
        return _slices(self.batch, self.num_samples)

    def state_slices(self) -> Iterator[slice]:
        return _slices(self.num_states, self.tile_states)


class _Lanes(NamedTuple):
    """The inputs of some samples as lanes: x, delta, u = delta x (S, D, K), B (S, N, K)."""

    x: Tensor
    delta: Tensor
    u: Tensor
    B: Tensor
    grid: _Grid

    @classmethod
    def cut(cls, x: Tensor, delta: Tensor, B: Tensor, grid: _Grid) -> _Lanes:
        x_lanes, delta_lanes = _to_lanes(x, grid), _to_lanes(delta, grid)
        return cls(x_lanes, delta_lanes, x_lanes * delta_lanes, _to_lanes(B, grid), grid)


class _Part(NamedTuple):
    """What the scan of some samples and some states reads, step by step."""

    delta: Sequence[Tensor]
    """S of (1, D, K)"""
    u: Sequence[Tensor]
    """S of (1, D, K)"""
    B: Sequence[Tensor]
    """S of (N, 1, K)"""
    rates: Tensor
    """(N, D, K), or (N, D, 1) where all of K have the same"""
    lane_decay: Tensor
    """(N, D, K) of all steps together"""
    grid: _Grid

    @classmethod
    def of(cls, lanes: _Lanes, A: Tensor, states: slice) -> _Part:
        rates = A[..., states].permute(2, 1, 0).contiguous()
        if A.shape[0] > 1:
            rates = rates.repeat_interleave(lanes.grid.num_lanes, -1)
            rates = rates.repeat(1, 1, lanes.u.shape[-1] // rates.shape[-1])
        delta, u = (t.unsqueeze(1).unbind(0) for t in (lanes.delta, lanes.u))
        lane_decay = lanes.delta.sum(0).mul(rates * LOG2_E).exp2_()
        return cls(delta, u, _steps_of_states(lanes.B, states), rates, lane_decay, lanes.grid)

    def shape(self, tiles: Tensor) -> list[Sequence[Tensor]]:
        """Tiles, each as S fronts."""
        front = self.lane_decay.shape
        shape = (-1, len(self.u), *front)
        size = len(self.u) * front.numel()
        return [tile.unbind(0) for tile in tiles[:, :size].view(shape).unbind(0)]

    def enter(self, decays: Sequence[Tensor]) -> Tensor:
        """The state (N, D, K) that enters each lane; fills the tile of decays."""
        rates = self.rates * LOG2_E
        local = torch.zeros_like(self.lane_decay)
        for delta, u, B, decay in zip(self.delta, self.u, self.B, decays, strict=True):
            torch.mul(delta, rates, out=decay).exp2_()
            local.mul_(decay).addcmul_(u, B)
        return _carry(self.lane_decay, local, self.grid)

    def read_out(
        self, C: Sequence[Tensor], outputs: Sequence[Tensor], decays: Sequence[Tensor]
    ) -> None:
        """Add C . h to the outputs (D, K) of every step."""
        state = self.enter(decays)
        product = torch.empty_like(state)
        for u, B, c, decay, y in zip(self.u, self.B, C, decays, outputs, strict=True):
            state.mul_(decay).addcmul_(u, B)
            y.add_(torch.mul(state, c, out=product).sum(0))

    def keep(self, decays: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
        """Fill both tiles; returns the state that enters each lane."""
        entering = before = self.enter(decays)
        for u, B, decay, state in zip(self.u, self.B, decays, states, strict=True):
            before = torch.mul(before, decay, out=state).addcmul_(u, B)
        return entering


class _Adjoint(NamedTuple):
    """The derivatives of some samples, gathered over tiles.

    With a_t = exp(delta_t A), the derivative by h_t is G_t = dy_t C_t + r_{t+1}, r_t = a_t G_t: a
    scan run backwards. The derivative by delta_t A is r_t h_{t-1}.
    """

    grad: Tensor
    C: Tensor
    sum_GB: Tensor
    """sum over n of G B: the derivative by u = delta x"""
    grad_delta: Tensor
    grad_B: Tensor
    grad_C: Tensor

    @classmethod
    def start(cls, lanes: _Lanes, grad: Tensor, C: Tensor) -> _Adjoint:
        zeros, like_B = torch.zeros_like(lanes.u), torch.empty_like(lanes.B)
        sums = (zeros, zeros.clone(), like_B, torch.empty_like(like_B))
        return cls(_to_lanes(grad, lanes.grid), _to_lanes(C, lanes.grid), *sums)

    def accumulate(
        self, part: _Part, states: slice, decays: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> Tensor:
        """Add one tile's share; returns the derivative by its rates (N, D, K)."""
        before = part.keep(decays, kept), *kept
        dy, C = self.grad.unsqueeze(1).unbind(0), _steps_of_states(self.C, states)
        r = self._leave(part, dy, C, decays)
        by_rate, product, by_exponent = (torch.zeros_like(r) for _ in range(3))
        grad_B, grad_C = (t[:, states].unbind(0) for t in (self.grad_B, self.grad_C))
        for s in reversed(range(len(dy))):
            G = r.addcmul_(dy[s], C[s])
            torch.sum(torch.mul(kept[s], dy[s], out=product), 1, out=grad_C[s])
            torch.sum(torch.mul(G, part.u[s], out=product), 1, out=grad_B[s])
            self.sum_GB[s].add_(torch.mul(G, part.B[s], out=product).sum(0))
            r = G.mul_(decays[s])
            torch.mul(r, before[s], out=by_exponent)
            self.grad_delta[s].add_(torch.mul(by_exponent, part.rates, out=product).sum(0))
            by_rate.addcmul_(by_exponent, part.delta[s])
        return by_rate

    def finish(self, lanes: _Lanes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Derivatives by x (direct path left out), delta, B and C, as lanes."""
        grad_delta = self.grad_delta.addcmul_(self.sum_GB, lanes.x)
        return self.sum_GB.mul_(lanes.delta), grad_delta, self.grad_B, self.grad_C

    @staticmethod
    def _leave(
        part: _Part, dy: Sequence[Tensor], C: Sequence[Tensor], decays: Sequence[Tensor]
    ) -> Tensor:
        """The r (N, D, K) of the step after each lane."""
        local = torch.zeros_like(part.lane_decay)
        for s in reversed(range(len(dy))):
            local.addcmul_(dy[s], C[s]).mul_(decays[s])
        return _carry(part.lane_decay, local, part.grid, is_reversed=True)


def _carry(decay: Tensor, local: Tensor, grid: _Grid, *, is_reversed: bool = False) -> Tensor:
    """What enters each lane of (N, D, K), from what they decay and add themselves."""
    entering = torch.empty_like(decay)
    order = -1 if is_reversed else 1
    decays, locals_, entered = (
        lanes.unflatten(-1, (-1, grid.lanes)).unbind(3)[::order]
        for lanes in (decay, local, entering)
    )
    group_decay, group_local = decays[0], locals_[0]
    for a, v in zip(decays[1:], locals_[1:], strict=True):
        group_local = torch.addcmul(v, a, group_local)
        group_decay = group_decay * a
    before = entered[0].copy_(_carry_groups(group_decay, group_local, grid, is_reversed))
    for a, v, lane in zip(decays[:-1], locals_[:-1], entered[1:], strict=True):
        before = torch.addcmul(v, a, before, out=lane)
    return entering


def _carry_groups(decay: Tensor, local: Tensor, grid: _Grid, is_reversed: bool) -> Tensor:
    """What enters each group of (N, D, B P G), in log2(G) steps.

    Hillis and Steele, "Data parallel algorithms", Commun. ACM 29 (1986), 1170-1183.
    """
    if grid.groups == 1:
        return torch.zeros_like(local)
    decay, local = (t.unflatten(-1, (-1, grid.groups)) for t in (decay, local))
    if is_reversed:
        decay, local = decay.flip(-1), local.flip(-1)
    shift = 1
    while shift < grid.groups:
        joined = torch.addcmul(local[..., shift:], decay[..., shift:], local[..., :-shift])
        local = torch.cat([local[..., :shift], joined], -1)
        decay = torch.cat([decay[..., :shift], decay[..., shift:] * decay[..., :-shift]], -1)
        shift *= 2
    entering = F.pad(local[..., :-1], (1, 0))
    return (entering.flip(-1) if is_reversed else entering).flatten(2)


def _to_lanes(tokens: Tensor, grid: _Grid) -> Tensor:
    """(B, P, L, F) -> (S, F, K), padded with zeros (decay 1, input 0: no effect)."""
    missing = math.prod(grid) - tokens.shape[2]
    padded = F.pad(tokens, (0, 0, 0, missing)) if missing else tokens
    lanes = padded.reshape(-1, grid.steps * tokens.shape[3])
    return lanes.T.contiguous().unflatten(0, (grid.steps, -1))


def _to_tokens(lanes: Tensor, grid: _Grid, shape: torch.Size) -> Tensor:
    """(S, F, K) -> (B, P, L, F) of the given shape, without the padding."""
    batch, sets, length, features = shape
    tokens = lanes.flatten(0, 1).T.contiguous().view(batch, sets, -1, features)
    return tokens[:, :, :length]


def _steps_of_states(lanes: Tensor, states: slice) -> Sequence[Tensor]:
    """(S, N, K) -> S of (n, 1, K)."""
    return lanes[:, states].unsqueeze(2).unbind(0)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
