"""ShuffleNet V1 against the published code's counts, and its unit written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.shufflenet_v1 import ShuffleNetV1, ShuffleUnit

PUBLISHED = {
    "1.0x, 3 groups": ({}, 1_864_728),
    "1.0x, 8 groups": ({"widths": (24, 384, 768, 1536), "groups": 8}, 2_433_768),
    "0.5x, 3 groups": ({"widths": (12, 120, 240, 480)}, 717_324),
}
TINY = {"widths": (4, 16, 32), "depths": (1, 2), "groups": 2}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_code(name):
    arguments, published = PUBLISHED[name]
    with torch.device("meta"):
        net = ShuffleNetV1(in_channels=3, num_classes=1000, **arguments)
    assert sum(parameter.numel() for parameter in net.parameters()) == published


def test_multiply_adds_at_224_pixels_are_those_of_the_published_code():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        ShuffleNetV1(in_channels=3, num_classes=1000).eval()(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(0.1375e9, rel=0.001)


def by_hand(unit, maps, groups, first_groups, stride):
    """What a fresh unit of 6 hidden channels gives before the two branches meet."""
    norm = (1 + 1e-5) ** 0.5
    hidden = F.conv2d(maps, unit.reduce[0].weight, groups=first_groups) / norm
    hidden = hidden.clamp(min=0)[:, [0, 2, 4, 1, 3, 5] if groups == 2 else [0, 3, 1, 4, 2, 5]]
    depthwise, _, pointwise, _ = unit.mix
    hidden = F.conv2d(hidden, depthwise.weight, stride=stride, padding=1, groups=6) / norm
    return F.conv2d(hidden, pointwise.weight, groups=groups) / norm


@pytest.mark.parametrize("groups", [2, 3])
def test_unit_of_equal_widths_adds_its_input(groups):
    torch.manual_seed(0)
    unit, maps = ShuffleUnit(24, 24, groups).eval(), torch.randn(2, 24, 5, 6)
    expected = (maps + by_hand(unit, maps, groups, groups, stride=1)).clamp(min=0)
    torch.testing.assert_close(unit(maps), expected)


def test_unit_that_widens_halves_the_size_and_keeps_the_pooled_input():
    torch.manual_seed(0)
    unit = ShuffleUnit(4, 24, 2, first_groups=1).eval()
    maps = torch.rand(2, 4, 5, 6)
    pooled = F.conv2d(maps, torch.full((4, 1, 3, 3), 1 / 9), stride=2, padding=1, groups=4)
    mixed = by_hand(unit, maps, 2, 1, stride=2).clamp(min=0)
    torch.testing.assert_close(unit(maps), torch.cat([pooled, mixed], 1))


def test_first_convolution_of_the_first_stage_alone_is_not_grouped():
    net = ShuffleNetV1(in_channels=1, num_classes=2, **TINY)
    assert [unit.reduce[0].groups for unit in net.units] == [1, 2, 2]


def test_logits_depend_on_the_shuffle(monkeypatch):
    torch.manual_seed(0)
    net, images = (
        ShuffleNetV1(in_channels=1, num_classes=3, **TINY).eval(),
        torch.randn(2, 1, 32, 32),
    )
    logits = net(images)
    monkeypatch.setattr("medlite.models.shufflenet_v1.channel_shuffle", lambda maps, _: maps)
    assert (net(images) - logits).abs().max() > 0.01 * logits.abs().max()


def test_head_is_linear_in_the_mean_of_all_pixels():
    torch.manual_seed(0)
    net, images = (
        ShuffleNetV1(in_channels=1, num_classes=3, **TINY).eval(),
        torch.randn(2, 1, 33, 50),
    )
    conv, norm, _, _ = net.stem
    maps = norm(F.conv2d(images, conv.weight, stride=2, padding=1)).clamp(min=0)
    features = net.units(F.max_pool2d(maps, 3, 2, 1))
    assert isinstance(norm, nn.BatchNorm2d)
    torch.testing.assert_close(net(images), features.mean((2, 3)) @ net.head.weight.T)


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (33, 50), (64, 64), (128, 128), (224, 224)])
def test_any_size_is_taken(size):
    net = ShuffleNetV1(in_channels=1, num_classes=5).eval()
    with torch.no_grad():
        assert net(torch.zeros(2, 1, *size)).shape == (2, 5)


def test_volumes_are_refused():
    with pytest.raises(ShapeError, match=r"model=shufflenet_v1 takes 2D images"):
        ShuffleNetV1(in_channels=1, num_classes=2, **TINY)(torch.zeros(1, 1, 16, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (4, 16)}, r"model\.depths: 2 stages do not go with the 1 of model\.widths"),
        ({"widths": (4, 16, 16)}, r"model\.widths: 16 is not greater than 16 before it"),
        (
            {"widths": (4, 16, 36)},
            r"model\.widths: 36 is not divisible by 8, 4 times model\.groups",
        ),
        ({"widths": (5, 16, 32)}, r"model\.widths: 16 - 5 is not divisible by 2, model\.groups"),
    ],
)
def test_widths_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ShuffleNetV1(in_channels=1, num_classes=2, **(TINY | arguments))
