"""Which units of which groups of channels go.

Shapes in docstrings: U units of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medlite.compression.channel_groups import ChannelGroup
from medlite.compression.channel_removal import Plan
from medlite.compression.channel_trace import Place
from medlite.compression.layer_names import check_names, matches

SCOPES = ("local", "global")

_ROUNDING = 1e-6
"""of a number of channels"""

GroupKey = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Candidate:
    """A group that may lose units: their scores (U,), and how many there were at first."""

    group: ChannelGroup
    scores: Tensor
    num_at_first: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How units are chosen; `StructuredPruning` says what the options mean."""

    scope: str
    round_to: int
    max_ratio: float

    def plans(self, candidates: Sequence[Candidate], share_left: float) -> list[Plan]:
        """What must go for at least this share of the first channels to be left, and no more.

        The plans for a smaller share contain those for a larger one.
        """
        if self.scope == "local":
            kept = [self._num_kept(candidate, share_left) for candidate in candidates]
        else:
            kept = self._rank_all(candidates, share_left)
        plans = (_plan(candidate, num) for candidate, num in zip(candidates, kept, strict=True))
        return [plan for plan in plans if plan[1]]

    def _num_kept(self, candidate: Candidate, share_left: float) -> int:
        step = self._step(candidate.group)
        least = candidate.num_at_first * share_left - _ROUNDING
        return max(1, math.ceil(least / step)) * step

    def _step(self, group: ChannelGroup) -> int:
        """The number of units is a multiple of this."""
        return math.lcm(self.round_to, group.unit_size) // group.unit_size

    def _rank_all(self, candidates: Sequence[Candidate], share_left: float) -> list[int]:
        """How many units each group keeps if the least important of all groups go first.

        They go in the blocks that `round_to` asks for, so that no rounding changes the share.
        """
        num_kept = [len(candidate.scores) for candidate in candidates]
        sizes = [candidate.group.unit_size for candidate in candidates]
        to_go = sum(
            size * (num - candidate.num_at_first * share_left)
            for size, num, candidate in zip(sizes, num_kept, candidates, strict=True)
        )
        blocks = [block for i, each in enumerate(candidates) for block in self._blocks(i, each)]
        for _, place, num_gone in sorted(blocks):
            num_after = len(candidates[place].scores) - num_gone
            to_go -= sizes[place] * (num_kept[place] - num_after)
            if to_go < -_ROUNDING:
                break
            num_kept[place] = num_after
        return num_kept

    def _blocks(self, place: int, candidate: Candidate) -> Iterator[tuple[float, int, int]]:
        """(mean relative score, place, units that are gone after it), in the order of going.

        The scores of a group are relative to their mean, as in torch-pruning: those of layers
        of different widths and gains cannot be compared otherwise.
        """
        scores = candidate.scores.double().sort().values
        scores = scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)
        step, least = self._step(candidate.group), self._num_kept(candidate, 1 - self.max_ratio)
        num, height = len(scores), 0.0
        while (num_after := (math.ceil(num / step) - 1) * step) >= least:
            block = scores[len(scores) - num : len(scores) - num_after]
            height = max(height, float(block.mean()))  # rounded, equal means may seem to fall
            yield height, place, len(scores) - num_after
            num = num_after


def group_key(group: ChannelGroup) -> GroupKey:
    """What a group of a net and the same group of the net without some channels share."""
    return tuple((m.name, m.axis, m.indices.shape[1]) for m in group.members)


def protected_places(net: nn.Module, names: Sequence[str]) -> set[Place]:
    """Where the output channels of the named layers, and of all layers of named blocks, are.

    Raises:
        MedliteError: a name matches no layer; with the closest one that there is.
    """
    modules = {
        name: module
        for name, module in net.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    check_names("protect", names, list(modules))
    return {
        (f"{path}.{leaf}", _output_axis(module))
        for path, module in modules.items()
        if any(matches(name, path) for name in names)
        for leaf, _ in module.named_parameters(recurse=False)
    }


def without(groups: Iterable[ChannelGroup], places: set[Place]) -> list[ChannelGroup]:
    """The groups that have no member at one of the places."""
    return [g for g in groups if not any((m.name, m.axis) in places for m in g.members)]


def _plan(candidate: Candidate, num_kept: int) -> Plan:
    num_gone = max(0, len(candidate.scores) - num_kept)
    return candidate.group, candidate.scores.topk(num_gone, largest=False).indices.tolist()


def _output_axis(module: nn.Module) -> int:
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return 1 if isinstance(module, transposed) else 0
