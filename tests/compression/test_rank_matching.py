import math

import pytest
import torch
from toy_world import TinyUNet, make_context, make_spec, train

from medlite.compression.distillation import Distillation
from medlite.compression.feature_maps import tapped
from medlite.compression.rank_matching import RankMatching, ranking_loss
from medlite.errors import ConfigError


def by_loops(student, teacher, top):
    """Over every two of the teacher's most important places, on one grid."""
    losses = []
    for own, wanted in zip(student, teacher, strict=True):
        taught = own.square().mean(0).flatten().tolist()
        order = wanted.square().mean(0).flatten().tolist()
        places = sorted(range(len(order)), key=lambda place: -order[place])[:top]
        for position, ahead in enumerate(places):
            losses += [
                math.log(1 + taught[behind] / taught[ahead]) for behind in places[position + 1 :]
            ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("top", [2, 5, 100])
def test_the_loss_is_the_pairwise_logistic_one_on_the_teachers_order(top):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, 4), torch.randn(2, 6, 3, 4)
    value = ranking_loss(student, teacher, top=top).item()
    assert value == pytest.approx(by_loops(student, teacher, top), rel=1e-5)


def test_the_same_order_costs_less_than_the_reverse_and_scale_costs_nothing():
    torch.manual_seed(0)
    teacher = torch.randn(2, 6, 4, 4, 4)
    same = ranking_loss(teacher, teacher, top=10)
    assert same < math.log(2) < ranking_loss(1 / teacher.square().sum(1, keepdim=True).sqrt(),
                                             teacher, top=10)  # fmt: skip
    assert torch.allclose(ranking_loss(7 * teacher, teacher, top=10), same)


def test_equal_importances_are_no_pair():
    assert ranking_loss(torch.randn(1, 2, 4, 4), torch.ones(1, 2, 4, 4), top=8).item() == 0.0


def test_grids_and_channels_may_differ_and_a_dead_map_stays_finite():
    student = torch.zeros(2, 3, 8, 8, requires_grad=True)
    value = RankMatching({"a": "b"}, top=4)({"a": student}, {"b": torch.randn(2, 5, 4, 4)})
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def output_of(net, path, images):
    with tapped(net.eval(), [path], "test") as outputs, torch.no_grad():
        net(images)
    return outputs[path]


def test_a_student_takes_over_the_order_of_its_teacher():
    spec = make_spec()
    teacher = train(TinyUNet(width=16), spec)
    context = make_context(spec, teacher=teacher)
    images = context.calibration_images(8)
    losses = []
    ranked = {"alpha": 0.0, "rank_weight": 5.0, "features": {"down": "down"}}
    for options in ({"alpha": 1e-9}, ranked):
        torch.manual_seed(0)
        step = Distillation(epochs=4, learning_rate=1e-2, **options)
        distilled, _ = step.apply(TinyUNet(width=8, dropout=0.0), context)
        maps = (output_of(net, "down", images) for net in (distilled, teacher))
        losses.append(ranking_loss(*maps, top=32).item())
    assert losses[1] < losses[0] - 0.05
    assert "ranks of 32 places with weight 5.0" in context.report.lines["distillation"]
    assert context.fit.hooks.auxiliary is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_weight": -1.0}, "rank_weight: -1.0 is not 0 or above"),
        ({"rank_top": 1}, "rank_top: 1 is not 2 or above"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(epochs=1, learning_rate=1e-3, **options)
