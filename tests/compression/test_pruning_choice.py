import itertools

import pytest
import torch
from torch import nn

from medlite.compression.channel_groups import ChannelGroup, Member
from medlite.compression.pruning_choice import Candidate, Choice, protected_places, without
from medlite.errors import MedliteError

SHARES = (0.9, 0.7, 0.5, 0.3, 0.11)


def candidate(name, scores, *, num_at_first=None, unit_size=1):
    indices = torch.arange(len(scores) * unit_size).view(-1, unit_size)
    group = ChannelGroup((Member(name, 0, indices),))
    return Candidate(group, torch.tensor(scores), num_at_first or len(scores))


def gone(plans):
    return {group.members[0].name: sorted(units) for group, units in plans}


def random_candidates():
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (16, 1), "b": (40, 1), "c": (12, 2), "d": (23, 1)}
    return [
        candidate(name, (torch.rand(num, generator=generator) * 10**i).tolist(), unit_size=size)
        for i, (name, (num, size)) in enumerate(sizes.items())
    ]


def test_locally_every_group_loses_the_same_share_and_its_lowest_scores():
    choice = Choice(scope="local", round_to=1, max_ratio=0.9)
    plans = choice.plans([candidate("a", [3.0, 1.0, 2.0, 4.0]), candidate("b", [9.0, 8.0])], 0.5)
    assert gone(plans) == {"a": [1, 2], "b": [1]}


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("num", [10, 20, 80, 100, 160, 240, 960])
def test_a_share_that_is_a_whole_number_of_channels_keeps_just_that_many(num, round_to):
    """1 - 0.7 is a little more than 0.3 in floating point; the exact share is of integers."""
    choice = Choice(scope="local", round_to=round_to, max_ratio=0.95)
    for tenths in range(1, 10):
        plans = choice.plans([candidate("a", [1.0] * num)], 1 - tenths / 10)
        num_kept = -(-num * (10 - tenths) // (10 * round_to)) * round_to
        assert sum(len(units) for _, units in plans) == max(0, num - num_kept)


def test_globally_the_lowest_relative_scores_of_all_groups_go():
    choice = Choice(scope="global", round_to=1, max_ratio=0.9)
    # relative to the means: 0.08, 0.08, 1.9, 1.9 and 0.75, 1, 1.25
    candidates = [candidate("a", [1.0, 1.0, 24.0, 24.0]), candidate("b", [75.0, 100.0, 125.0])]
    assert gone(choice.plans(candidates, 4 / 7)) == {"a": [0, 1], "b": [0]}


def test_globally_scores_are_compared_whatever_the_scale_of_a_group():
    choice = Choice(scope="global", round_to=1, max_ratio=0.9)
    scores = [[1.0, 5.0, 6.0], [2.0, 3.0, 7.0]]
    plain, scaled = (
        gone(choice.plans([candidate("a", scores[0]), candidate("b", (gain * b).tolist())], 0.6))
        for gain in (1.0, 1e6)
        for b in [torch.tensor(scores[1])]
    )
    assert plain == scaled


@pytest.mark.parametrize("round_to", [1, 4, 8])
@pytest.mark.parametrize("share", SHARES)
def test_globally_no_more_goes_than_asked_and_less_than_one_block_is_missing(round_to, share):
    candidates = random_candidates()
    plans = Choice(scope="global", round_to=round_to, max_ratio=0.99).plans(candidates, share)
    total = sum(c.group.num_units * c.group.unit_size for c in candidates)
    num_gone = sum(len(units) * group.unit_size for group, units in plans)
    assert num_gone <= total * (1 - share)
    assert num_gone > total * (1 - share) - max(2, round_to) or share < 0.3  # the floors


@pytest.mark.parametrize("share", SHARES)
def test_what_a_group_keeps_is_a_multiple_and_not_below_its_floor(share):
    plans = Choice(scope="global", round_to=4, max_ratio=0.5).plans(random_candidates(), share)
    assert plans
    for group, units in plans:
        num_kept = (group.num_units - len(units)) * group.unit_size
        assert num_kept % 4 == 0
        assert num_kept >= 0.5 * group.num_units * group.unit_size


@pytest.mark.parametrize("scope", ["local", "global"])
def test_what_goes_for_a_larger_share_goes_for_a_smaller_one_too(scope):
    choice = Choice(scope=scope, round_to=4, max_ratio=0.9)
    plans = [gone(choice.plans(random_candidates(), share)) for share in SHARES]
    for fewer, more in itertools.pairwise(plans):
        assert all(set(units) <= set(more[name]) for name, units in fewer.items())


@pytest.mark.parametrize("scope", ["local", "global"])
def test_shares_are_of_the_channels_before_the_first_turn(scope):
    choice = Choice(scope=scope, round_to=1, max_ratio=0.9)
    scores = [float(i) for i in range(6)]
    (plan,) = choice.plans([candidate("a", scores, num_at_first=8)], 0.5)
    assert sorted(plan[1]) == [0, 1]
    assert choice.plans([candidate("a", scores[:4], num_at_first=8)], 0.5) == []


def test_scores_that_are_all_zero_can_be_ranked():
    choice = Choice(scope="global", round_to=1, max_ratio=0.9)
    plans = choice.plans([candidate("a", [0.0] * 4), candidate("b", [1.0] * 4)], 0.5)
    assert len(gone(plans)["a"]) == 3


class Block(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.up = nn.ConvTranspose2d(3, 2, 1)


@pytest.fixture
def net():
    return nn.ModuleDict({"encoder": Block(), "fc2": nn.Linear(3, 3)})


def test_a_name_protects_the_output_of_the_layers_whose_path_it_is_a_part_of(net):
    assert protected_places(net, ["fc"]) == {("encoder.fc.weight", 0), ("encoder.fc.bias", 0)}
    assert protected_places(net, ["fc2"]) == {("fc2.weight", 0), ("fc2.bias", 0)}


def test_a_block_protects_all_its_layers(net):
    places = protected_places(net, ["encoder"])
    assert {("encoder.fc.weight", 0), ("encoder.up.weight", 1)} <= places
    assert not any(name.startswith("fc2") for name, _ in places)


def test_a_group_is_protected_by_any_of_its_members():
    indices = torch.arange(3)[:, None]
    inner = ChannelGroup((Member("a.weight", 0, indices), Member("b.weight", 1, indices)))
    assert without([inner], {("b.weight", 0)}) == [inner]
    assert without([inner], {("a.weight", 0)}) == []


def test_a_name_without_layer_is_told_the_closest(net):
    with pytest.raises(
        MedliteError, match=r"protect: no layer is called 'encoder.fx', did you mean"
    ):
        protected_places(net, ["encoder.fx"])
