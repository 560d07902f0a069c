"""LightM-UNet against the published code's counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.layers.ssm import Ssm
from medlite.models.lightm_unet import LightMUNet


@pytest.mark.parametrize(
    ("in_channels", "num_classes", "arguments", "expected"),
    [
        (1, 2, {}, 5_011_683),
        (3, 1, {}, 5_011_732),
        (1, 2, {"spatial_dims": 3}, 5_015_733),
        (1, 1, {"init_filters": 16, "blocks_down": (1, 2, 2, 3)}, 1_075_888),
    ],
)
def test_parameters_are_those_of_the_published_code(in_channels, num_classes, arguments, expected):
    net = LightMUNet(in_channels=in_channels, num_classes=num_classes, **arguments)
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


def test_multiply_adds_at_256_pixels_are_those_of_the_published_code():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        LightMUNet(in_channels=3, num_classes=1).eval()(torch.empty(1, 3, 256, 256))
    scan_flops = counter.get_flop_counts()["Global"][torch.ops.medlite.selective_scan]
    assert scan_flops == pytest.approx(4.75e9, rel=0.001)
    assert (counter.get_total_flops() - scan_flops) / 2 == pytest.approx(11.94e9, rel=0.001)


def test_recurrence_reaches_every_scan():
    ssm = Ssm(kind="ssd", d_state=3)
    net = LightMUNet(in_channels=1, num_classes=1, init_filters=8, ssm=ssm)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 1, 8, 8))
    scans = counter.get_flop_counts()["Global"].keys() & {
        torch.ops.medlite.selective_scan, torch.ops.medlite.ssd_scan,
    }  # fmt: skip
    assert scans == {torch.ops.medlite.ssd_scan}
    widths = {p.shape[0] for name, p in net.named_parameters() if "x_proj" in name}
    assert widths == {1 + 6, 2 + 6, 4 + 6}


def test_volumes_are_segmented():
    net = LightMUNet(in_channels=1, num_classes=2, spatial_dims=3, init_filters=8)
    assert net(torch.zeros(1, 1, 16, 8, 24)).shape == (1, 2, 16, 8, 24)


def test_wrong_size_is_refused_with_one_that_works():
    net = LightMUNet(in_channels=1, num_classes=1, init_filters=8)
    message = "model=lightm_unet needs sides divisible by 8, got 28x28; set dataset.image_size=32"
    with pytest.raises(ShapeError, match=message):
        net(torch.zeros(1, 1, 28, 28))


def test_volumes_are_refused_by_the_2d_form():
    net = LightMUNet(in_channels=1, num_classes=1, init_filters=8)
    with pytest.raises(
        ShapeError, match=r"model=lightm_unet takes 2D images .* got \(1, 1, 8, 8, 8\)"
    ):
        net(torch.zeros(1, 1, 8, 8, 8))


def test_width_that_does_not_split_into_groups_is_refused():
    with pytest.raises(ConfigError, match=r"model\.init_filters: 12 is not divisible by 8"):
        LightMUNet(in_channels=1, num_classes=1, init_filters=12)
