"""Which ranks the layers of a net get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medlite.compression.low_rank_factors import (
    Factorable,
    Positions,
    Ranks,
    full_ranks,
    kept_energy,
    num_macs,
)

LEAST_RANK = 8
"""below it kernels are no faster, and a layer is all but cut through"""

NUM_HALVINGS = 60
"""of the interval of prices: more than float64 can tell apart"""


@dataclass(frozen=True)
class RankChoices:
    """The forms that a layer can take; the last one is the layer as it is.

    ranks: (F, 1 or 2) int64. macs: (F,) int64, multiply-adds an image. energy: (F,) float64, the
    share of the squared weights that is kept.
    """

    ranks: Tensor
    macs: Tensor
    energy: Tensor

    @property
    def whole(self) -> int:
        """The index of the layer as it is."""
        return len(self.macs) - 1

    def at_least(self, energy: float, ranks: Ranks = ()) -> RankChoices:
        """Only the forms that keep this share of energy, and these ranks, and the last one."""
        keeps = self.energy >= energy
        if ranks:
            keeps &= (self.ranks >= torch.tensor(ranks)).all(1)
        keeps[-1] = True
        return RankChoices(self.ranks[keeps], self.macs[keeps], self.energy[keeps])

    def cheapest(self) -> int:
        """The index of the form of least multiply-adds."""
        return int(self.macs.argmin())


def rank_choices(layer: Factorable, at: Positions, *, round_to: int) -> RankChoices:
    """All forms of a layer that save multiply-adds, and the layer itself.

    Ranks are multiples of `round_to` from 8 up, or full along an axis.
    """
    full = full_ranks(layer)
    axes = torch.meshgrid(*(_steps(rank, round_to) for rank in full), indexing="ij")
    energy = kept_energy(layer)[tuple(axis - 1 for axis in axes)].flatten()
    macs = num_macs(layer, at, axes).flatten()
    whole = num_macs(layer, at)
    saves = macs < whole
    return RankChoices(
        torch.cat([torch.stack(axes, -1).flatten(0, -2)[saves], torch.tensor([full])]),
        torch.cat([macs[saves], torch.tensor([whole])]),
        torch.cat([energy[saves], torch.ones(1, dtype=energy.dtype)]),
    )


def choose_within(layers: Sequence[RankChoices], budget: float) -> list[int]:
    """The forms that keep the largest product of energies within a budget of multiply-adds.

    The product is the aim of Zhang et al., "Accelerating Very Deep Convolutional Networks for
    Classification and Detection", arXiv:1505.06798, section 2.3: it lets no layer be cut through,
    and unlike one rank fraction for all layers it spares those that lose much for little. Where
    they remove one rank after the other, here one search finds the price of a multiply-add at
    which every layer, choosing for itself, together meet the budget (Everett's multipliers): two
    ranks a layer and layers better left whole, both jumps for a greedy search, need no rules of
    their own. What is left of the budget then goes to the layers that lost most.

    Args:
        layers: the forms of each.
        budget: multiply-adds an image of all layers; exceeded only if the cheapest forms do.

    Returns:
        The index of the form of each layer.
    """
    total = max(1, sum(int(layer.macs[layer.whole]) for layer in layers))
    low, high = 0.0, 1.0
    chosen = [layer.cheapest() for layer in layers]
    if _spent(layers, chosen) > budget:
        return chosen
    while _spent(layers, at_high := _choose_at(layers, high / total)) > budget:
        low, high = high, 2 * high
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        at_middle = _choose_at(layers, middle / total)
        if _spent(layers, at_middle) > budget:
            low = middle
        else:
            high, at_high = middle, at_middle
    return _spend_rest(layers, at_high, budget)


def _steps(full: int, round_to: int) -> Tensor:
    start = math.ceil(LEAST_RANK / round_to) * round_to
    return torch.tensor([*range(start, full, round_to), full])


def _spent(layers: Sequence[RankChoices], chosen: Sequence[int]) -> int:
    return sum(int(layer.macs[index]) for layer, index in zip(layers, chosen, strict=True))


def _choose_at(layers: Sequence[RankChoices], price: float) -> list[int]:
    return [int((_log_energy(layer) - price * layer.macs).argmax()) for layer in layers]


def _spend_rest(layers: Sequence[RankChoices], chosen: Sequence[int], budget: float) -> list[int]:
    better = list(chosen)
    for place in sorted(range(len(layers)), key=lambda i: float(layers[i].energy[better[i]])):
        layer = layers[place]
        limit = budget - _spent(layers, better) + int(layer.macs[better[place]])
        better[place] = int(layer.energy.where(layer.macs <= limit, -1.0).argmax())
    return better


def _log_energy(layer: RankChoices) -> Tensor:
    return layer.energy.clamp_min(torch.finfo(layer.energy.dtype).tiny).log()
