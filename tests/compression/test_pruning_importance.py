import torch
from torch import nn
from toy_world import TinyClassifier, make_batch

from medlite.compression.channel_groups import ChannelGroup, Member
from medlite.compression.channel_importance import accumulate_evidence, score_units, scored_weights


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


def test_bn_scale_is_the_mean_size_of_the_scales_of_batch_normalisation():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.LayerNorm(2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([-3.0, 0.5]))
    group = group_of(*((f"{i}.weight", 0, [[0], [1]]) for i in range(3)))
    weights = scored_weights(net, "bn_scale")
    assert score_units(group, weights, "bn_scale").tolist() == [3.0, 0.5]


def test_hessian_is_the_squared_weight_times_the_mean_square_of_gradients_of_single_images(classes):
    net = TinyClassifier(width=4).eval()
    batches = [make_batch(classes, 3, seed=seed) for seed in (0, 1)]
    accumulate_evidence(net, batches, classes, "hessian")
    name = "head.weight"
    weight = dict(net.named_parameters())[name]

    def loss(parameters, image, target):
        logits = torch.func.functional_call(net, parameters, (image[None],))
        return torch.nn.functional.cross_entropy(logits, target[None])

    parameters = {n: p.detach() for n, p in net.named_parameters()}
    gradients = torch.cat(
        [
            torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, b.image, b.target)[
                name
            ]
            for b in batches
        ]
    )
    expected = (weight.square() * gradients.square().mean(0)).sum(0)
    group = group_of((name, 1, [[i] for i in range(8)]))
    scores = score_units(group, scored_weights(net, "hessian"), "hessian")
    assert torch.allclose(scores, expected, rtol=1e-4)


def test_random_scores_follow_the_seed_alone():
    group = group_of(("a", 0, [[0], [1], [2]]))
    weights = {"a": torch.zeros(3)}
    scores = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        scores.append(score_units(group, weights, "random").tolist())
    assert scores[0] == scores[1] != scores[2]
