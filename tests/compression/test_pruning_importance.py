import torch

from medlite.compression.channel_groups import ChannelGroup, Member
from medlite.compression.channel_importance import score_units


def group_of(*members):
    return ChannelGroup(
        tuple(Member(n, axis, torch.tensor(indices)) for n, axis, indices in members)
    )


def test_magnitude_is_the_mean_square_over_the_weights_that_hold_a_unit():
    weights = {"a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0, 6.0])}
    group = group_of(("a.weight", 1, [[0], [1]]), ("b", 0, [[0], [1]]))
    assert score_units(group, weights, "magnitude").tolist() == [
        (1 + 9 + 25) / 2,
        (4 + 16 + 36) / 2,
    ]


def test_a_unit_of_several_channels_counts_all_of_them():
    weights = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    assert score_units(group_of(("a", 0, [[0, 2], [1, 3]])), weights, "magnitude").tolist() == [
        10,
        20,
    ]


def test_taylor_is_the_size_of_weight_times_gradient():
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    weight.grad = torch.tensor([[0.5, 1.0], [0.0, -0.25]])
    group = group_of(("a", 0, [[0], [1]]))
    assert score_units(group, {"a": weight}, "taylor").tolist() == [2.5, 1.0]


def test_biases_and_buffers_do_not_count():
    weights = {"a.weight": torch.tensor([1.0, 2.0]), "a.bias": torch.tensor([9.0, 0.0])}
    group = group_of(
        ("a.weight", 0, [[0], [1]]), ("a.bias", 0, [[0], [1]]), ("running_mean", 0, [[0], [1]])
    )
    assert score_units(group, weights, "magnitude").tolist() == [1, 4]
