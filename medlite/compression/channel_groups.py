"""Which channels of a net can only be removed together.

As in DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900),
dependencies come from the graph of the net. Here they are followed index by index, through the
operators of the exported graph (`medlite.compression.channel_rules`), so that permutations,
shared weights, merged patches and whatever else moves channels around need no rules of their own.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from medlite.compression.channel_labels import FIXED
from medlite.compression.channel_trace import Place


@dataclass(frozen=True)
class Member:
    """An axis of a weight that holds the channels of a group."""

    name: str
    axis: int
    indices: Tensor
    """(U, M): where each of the U units is found, M times"""


@dataclass(frozen=True)
class ChannelGroup:
    """Interchangeable units of channels; a unit goes from all its members at once."""

    members: tuple[Member, ...]

    @property
    def num_units(self) -> int:
        """U."""
        return len(self.members[0].indices)

    @property
    def unit_size(self) -> int:
        """Channels that a unit has in most of its members."""
        return statistics.mode(member.indices.shape[1] for member in self.members)


def find_groups(classes: Mapping[Place, Tensor]) -> list[ChannelGroup]:
    """All groups of channels that are free to go; `classes` are those of `label_channels`."""
    units: dict[int, dict[Place, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, roots in classes.items():
        for index, root in enumerate(roots.tolist()):
            units[root][place].append(index)
    units.pop(FIXED, None)
    alike = defaultdict(list)
    for unit in units.values():
        alike[tuple((place, len(indices)) for place, indices in unit.items())].append(unit)
    return [_group(some) for some in alike.values() if len(some) > 1 and len(some[0]) > 1]


def _group(units: list[dict[Place, list[int]]]) -> ChannelGroup:
    members = (
        Member(name, axis, torch.tensor([unit[name, axis] for unit in units]))
        for name, axis in units[0]
    )
    return ChannelGroup(tuple(members))
