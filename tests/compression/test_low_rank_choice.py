import itertools
import math

import pytest
import torch
from torch import nn

from medlite.compression.low_rank_choice import RankChoices, choose_within, rank_choices
from medlite.compression.low_rank_factors import Positions


def random_layers(seed, count=4, forms=6):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(count):
        macs = torch.randint(10, 1000, (forms,), generator=generator).sort().values
        energy = torch.rand(forms, generator=generator).double().sort().values
        energy[-1] = 1.0
        layers.append(RankChoices(torch.arange(forms)[:, None], macs, energy))
    return layers


def cost(layers, chosen):
    return sum(int(layer.macs[index]) for layer, index in zip(layers, chosen, strict=True))


def kept(layers, chosen):
    return math.prod(float(layer.energy[i]) for layer, i in zip(layers, chosen, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_near_the_best_one(seed):
    """A brute force tries all 6^4."""
    layers = random_layers(seed)
    everything = itertools.product(range(6), repeat=4)
    by_force = [(cost(layers, some), kept(layers, some)) for some in everything]
    total = cost(layers, [5] * 4)
    for ratio in (0.3, 0.5, 0.8):
        chosen = choose_within(layers, ratio * total)
        assert cost(layers, chosen) <= ratio * total
        best = max(energy for macs, energy in by_force if macs <= ratio * total)
        assert kept(layers, chosen) > 0.6 * best  # the gap of whole steps, in so small a problem


def test_of_equal_layers_in_small_steps_each_gets_the_same():
    macs = torch.arange(1, 1001)
    energy = (torch.arange(1, 1001).double() / 1000) ** 0.2
    layers = [RankChoices(macs[:, None], macs, energy)] * 3
    chosen = choose_within(layers, 1200)
    assert cost(layers, chosen) == 1200
    assert max(chosen) - min(chosen) <= 1


def test_a_layer_that_loses_much_for_little_is_spared():
    ranks = torch.arange(1, 11)[:, None]
    steep = RankChoices(ranks, torch.arange(10, 110, 10), torch.arange(1, 11).double() / 10)
    level = RankChoices(ranks, torch.arange(100, 1100, 100), (ranks[:, 0] + 90) / 100.0)
    assert choose_within([steep, level], 400) == [9, 2]


def test_what_is_left_of_a_budget_is_spent():
    """The whole layer is far away; a multiplier alone would stop at the first form."""
    layer = RankChoices(
        torch.tensor([[8], [16], [24]]),
        torch.tensor([10, 60, 100]),
        torch.tensor([0.5, 0.6, 1.0]).double(),
    )
    assert choose_within([layer], 70) == [1]


def test_a_budget_out_of_reach_gets_the_cheapest():
    layers = random_layers(0)
    assert choose_within(layers, 1) == [0] * 4


def test_ranks_are_multiples_from_eight_up_or_full():
    forms = rank_choices(nn.Conv2d(20, 48, 3), Positions(64, 64), round_to=8)
    assert forms.ranks[:-1].unique(dim=0).shape == forms.ranks[:-1].shape
    assert set(forms.ranks[:, 0].tolist()) <= {8, 16, 24, 32, 40, 48}
    assert set(forms.ranks[:-1, 1].tolist()) == {8, 16, 20}


def test_only_forms_that_save_are_offered():
    forms = rank_choices(nn.Linear(64, 32), Positions(10, 10), round_to=1)
    assert forms.macs[-1] == 10 * 64 * 32
    assert forms.ranks[:-1, 0].tolist() == [*range(8, 22)]  # 22 * 96 > 64 * 32
    assert (forms.energy.diff() > 0).all()


def test_a_narrow_layer_has_no_other_form():
    assert rank_choices(nn.Linear(16, 12), Positions(10, 10), round_to=8).whole == 0


def test_bounds_leave_the_forms_above_them():
    layer = nn.Conv2d(32, 32, 3)
    forms = rank_choices(layer, Positions(64, 64), round_to=8)
    by_energy = forms.at_least(0.6)
    assert (by_energy.energy >= 0.6).all()
    assert by_energy.macs[by_energy.cheapest()] == forms.macs[forms.energy >= 0.6].min()
    by_rank = forms.at_least(0.0, (9, 17))
    assert by_rank.ranks[by_rank.cheapest()].tolist() == [16, 24]
    assert forms.at_least(0.0, (33, 33)).cheapest() == 0
