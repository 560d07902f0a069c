"""The selective scan as a short list of plain ATen operations, for runtimes without loops.

The L tokens are cut into G lanes of S contiguous steps, which advance side by side: a first pass
over the steps finds what every lane adds to a zero state, a scan over the lanes finds the state
that enters each of them, and a second pass starts from there. There are 2 S steps instead of L,
on tensors of E / S elements (E = B P L D N); each pass computes the decays anew, since to keep
them would take E elements. All exponents are negative or zero, so nothing overflows for any
delta.

Letters: B batch, P parameter sets, L tokens, D channels, N states; S steps of a lane, G lanes.
The state is (B, P, G, N, D), at most six axes long when lanes are grouped, which is what XNNPACK
can take; its rows run over the channels.
"""

# ruff: noqa: N803, PLR0917 - the letters and the argument order of the paper

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 8
"""Tokens of a lane. With 16 the graph doubles and the tensors halve, and XNNPACK is as fast."""

GROUP = 8
"""Lanes that are joined one after another; then the groups are, and so on."""


def unrolled_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """As `torch.ops.medlite.selective_scan`, of which it is torch's registered decomposition.

    Args:
        x: (B, P, L, D) inputs; all sides but B must be fixed when a program is traced.
        delta: (B, P, L, D) step sizes, not negative.
        A: (P, D, N) negative decay rates.
        B: (B, P, L, N) input weights.
        C: (B, P, L, N) read-out weights.
        D: (P, D) weights of the direct path.

    Returns:
        (B, P, L, D) outputs.
    """
    length = x.shape[2]
    lanes = _Lanes.cut(x, delta, A, B, C, steps=min(STEPS, length))
    entering = _enter(lanes.decay(), lanes.advance())
    y = lanes.read_out(entering).reshape(x.shape[0], x.shape[1], -1, x.shape[3])
    return y.narrow(2, 0, length) + D.reshape(-1, 1, D.shape[1]) * x


class _Lanes(NamedTuple):
    """What every step takes, side by side in all lanes."""

    delta: list[Tensor]
    """S of (B, P, G, 1, D)"""
    u: list[Tensor]
    """S of (B, P, G, 1, D), delta x"""
    B: list[Tensor]
    """S of (B, P, G, N, 1)"""
    C: list[Tensor]
    """S of (B, P, G, 1, N)"""
    rates: Tensor
    """(P, 1, N, D)"""

    @classmethod
    def cut(cls, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, steps: int) -> _Lanes:
        sets, channels, states = A.shape
        return cls(
            delta=_slices(_to_lanes(delta, steps), 3),
            u=_slices(_to_lanes(delta * x, steps), 3),
            B=_slices(_to_lanes(B, steps).transpose(3, 4), 4),
            C=_slices(_to_lanes(C, steps), 3),
            rates=A.transpose(1, 2).reshape(sets, 1, states, channels),
        )

    def step(self, state: Tensor, index: int) -> Tensor:
        decay = (self.delta[index] * self.rates).exp()
        return state * decay + self.u[index] * self.B[index]

    def advance(self) -> Tensor:
        """The last state of lanes that start from zero."""
        state = self.u[0] * self.B[0]
        for index in range(1, len(self.u)):
            state = self.step(state, index)
        return state

    def decay(self) -> Tensor:
        """The decay over all steps of a lane."""
        return (sum(self.delta[1:], self.delta[0]) * self.rates).exp()

    def read_out(self, state: Tensor) -> Tensor:
        """(B P G, S, D) outputs of lanes that start from `state`."""
        outputs = []
        for index, C in enumerate(self.C):
            state = self.step(state, index)
            outputs.append(torch.bmm(C.flatten(0, 2), state.flatten(0, 2)))
        return torch.cat(outputs, 1)


def _enter(decay: Tensor, added: Tensor) -> Tensor:
    """The state that enters each lane: zero, then decay * state + added of the one before it.

    Lanes are treated as the tokens were: groups of them advance side by side, and so on.
    """
    lanes = decay.shape[2]
    if lanes == 1:
        return added * 0.0
    decays, addeds = _groups(decay), _groups(added)
    group_decay, state = decays[0], addeds[0]
    for a, v in zip(decays[1:], addeds[1:], strict=True):
        group_decay, state = group_decay * a, state * a + v
    state = _enter(group_decay.flatten(2, 3), state.flatten(2, 3)).reshape(state.shape)
    states = [state]
    for a, v in zip(decays[:-1], addeds[:-1], strict=True):
        state = state * a + v
        states.append(state)
    return torch.cat(states, 3).flatten(2, 3).narrow(2, 0, lanes)


def _groups(lanes: Tensor) -> list[Tensor]:
    """(B, P, G, N, D) -> the first of each group, the second ..., (B, P, groups, 1, N, D)."""
    size = min(GROUP, lanes.shape[2])
    missing = -lanes.shape[2] % size
    padded = F.pad(lanes, (0, 0, 0, 0, 0, missing)) if missing else lanes
    return _slices(padded.unflatten(2, (-1, size)), 3)


def _to_lanes(tokens: Tensor, steps: int) -> Tensor:
    """(B, P, L, F) -> (B, P, G, S, F), padded with zeros (decay 1, input 0: no effect)."""
    missing = -tokens.shape[2] % steps
    padded = F.pad(tokens, (0, 0, 0, missing)) if missing else tokens
    return padded.unflatten(2, (-1, steps))


def _slices(tensor: Tensor, axis: int) -> list[Tensor]:
    """All slices along `axis`, which they keep, with one entry."""
    return [tensor.narrow(axis, index, 1) for index in range(tensor.shape[axis])]
