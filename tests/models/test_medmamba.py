"""MedMamba against the published code's counts, and its block as the paper draws it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.layers.ssm import Ssm
from medlite.models.medmamba import MedMamba, SSConvSSM

LITE = {"width": 32, "depths": (2, 2, 2, 2), "separable_conv": True, "shared_scan": True}


def count_parameters(**arguments):
    with torch.device("meta"):
        net = MedMamba(in_channels=3, num_classes=6, **arguments)
    return sum(parameter.numel() for parameter in net.parameters())


def count_operations(**arguments):
    """(multiply-adds, FLOPs of the scans) at 224 x 224 pixels."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        net = MedMamba(in_channels=3, num_classes=6, **arguments).eval()
        net(torch.empty(1, 3, 224, 224))
    scan_flops = counter.get_flop_counts()["Global"][torch.ops.medlite.selective_scan]
    return (counter.get_total_flops() - scan_flops) / 2, scan_flops


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 14_457_222),
        ({"depths": (2, 2, 8, 2)}, 18_625_158),
        ({"depths": (2, 2, 12, 2)}, 22_793_094),
        ({"depths": (2, 2, 12, 2), "width": 128}, 39_864_838),
        ({"depths": (2, 2, 16, 2), "width": 128}, 47_126_022),
    ],
)
def test_parameters_are_those_of_the_published_code(arguments, expected):
    assert count_parameters(**arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({}, (2.242e9, 0.747e9)), ({"depths": (2, 2, 8, 2)}, (3.034e9, 0.923e9))],
)
def test_multiply_adds_at_224_pixels_are_those_of_the_published_code(arguments, expected):
    assert count_operations(**arguments) == pytest.approx(expected, rel=0.001)


def test_lite_has_about_a_22nd_of_the_parameters_and_multiply_adds():
    assert count_parameters(**LITE) == 653_958
    assert count_parameters() / count_parameters(**LITE) == pytest.approx(22.8, rel=0.05)
    assert count_operations(**LITE)[0] < count_operations()[0] / 20


def test_block_convolves_one_half_scans_the_other_and_interleaves_them():
    torch.manual_seed(0)
    block, maps = SSConvSSM(8, 0.0, Ssm(d_state=4)).eval(), torch.randn(2, 5, 6, 8)
    left, right = maps[..., :4], maps[..., 4:]
    convolved = block.conv33conv33conv11(left.movedim(-1, 1)).movedim(1, -1)
    scanned = block.self_attention(block.ln_1(right))
    expected = maps.clone()
    for channel in range(4):
        expected[..., 2 * channel] += convolved[..., channel]
        expected[..., 2 * channel + 1] += scanned[..., channel]
    torch.testing.assert_close(block(maps), expected)


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (20, 36)])
def test_small_images_are_taken(size):
    net = MedMamba(in_channels=1, num_classes=5, **LITE).eval()
    assert net(torch.zeros(2, 1, *size)).shape == (2, 5)


def test_wrong_size_is_refused_with_one_that_works():
    net = MedMamba(in_channels=1, num_classes=2, width=16, depths=(1, 1))
    message = "model=medmamba needs sides divisible by 4, got 30x30; set dataset.image_size=32"
    with pytest.raises(ShapeError, match=message):
        net(torch.zeros(1, 1, 30, 30))


def test_volumes_are_refused():
    net = MedMamba(in_channels=1, num_classes=2, width=16, depths=(1, 1))
    with pytest.raises(ShapeError, match=r"model=medmamba takes 2D images"):
        net(torch.zeros(1, 1, 16, 16, 16))


def test_width_that_cannot_be_halved_is_refused():
    with pytest.raises(ConfigError, match=r"model\.width: 15 is not even"):
        MedMamba(in_channels=1, num_classes=2, width=15)
