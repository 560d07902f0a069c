"""The asymmetric hybrid for volumes: its cost, which slices see each other, what it refuses."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.layers.ssm import Ssm
from medlite.models.slice_mamba_unet import SliceMambaUNet

SMALL = {"widths": (8, 16), "depths": (0, 1)}


def make_net(**arguments):
    torch.manual_seed(0)
    return SliceMambaUNet(in_channels=1, num_classes=2, **arguments).eval()


def make_volumes(*size):
    return torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))


def test_parameters_are_the_stated_590529():
    net = SliceMambaUNet(in_channels=1, num_classes=1)
    assert sum(parameter.numel() for parameter in net.parameters()) == 590_529


def test_most_weights_are_in_the_encoder():
    net = SliceMambaUNet(in_channels=1, num_classes=1)
    assert sum(p.numel() for p in net.encoder.parameters()) > 0.9 * 590_529


def test_multiply_adds_and_scans_of_a_volume_are_the_stated_ones():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        SliceMambaUNet(in_channels=1, num_classes=1).eval()(torch.empty(1, 1, 64, 64, 32))
    scan_flops = counter.get_flop_counts()["Global"][torch.ops.medlite.selective_scan]
    inner_elements = 32 * (16**2 * 128 + 8**2 * 256)
    assert scan_flops == 2 * 4 * inner_elements * (9 * 16 + 2)
    assert scan_flops == pytest.approx(1.84e9, rel=0.005)
    assert (counter.get_total_flops() - scan_flops) / 2 == pytest.approx(2.25e9, rel=0.005)


def test_recurrence_reaches_every_scan():
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        make_net(ssm=Ssm(kind="ssd", d_state=3))(make_volumes(8, 8, 2))
    scans = counter.get_flop_counts()["Global"].keys() & {
        torch.ops.medlite.selective_scan, torch.ops.medlite.ssd_scan,
    }  # fmt: skip
    assert scans == {torch.ops.medlite.ssd_scan}


def test_encoder_halves_height_and_width_but_not_the_depth():
    scales = make_net().encoder(make_volumes(16, 24, 5))
    assert [tuple(scale.shape) for scale in scales] == [
        (1, 16, 16, 24, 5), (1, 32, 8, 12, 5), (1, 64, 4, 6, 5), (1, 128, 2, 3, 5),
    ]  # fmt: skip


def test_encoder_sees_each_slice_as_if_it_were_alone():
    encoder, volumes = make_net(**SMALL).encoder, make_volumes(8, 8, 4)
    together = encoder(volumes)
    for index in range(4):
        alone = encoder(volumes[..., index : index + 1])
        for whole, single in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[..., index : index + 1], single)


def test_logits_of_a_slice_depend_on_the_slices_beside_it():
    net, volumes = make_net(**SMALL), make_volumes(8, 8, 9)
    changed = volumes.clone()
    changed[..., 4] *= -1
    difference = (net(changed) - net(volumes)).abs().amax((0, 1, 2, 3))
    assert (difference[[2, 3, 5, 6]] > 1e-3 * difference[4]).all()


def test_depth_is_free():
    net = make_net(**SMALL)
    for depth in (1, 3, 6):
        assert net(make_volumes(8, 4, depth)).shape == (1, 2, 8, 4, depth)


def test_wrong_size_is_refused_with_one_that_works():
    message = (
        "model=slice_mamba_unet needs a height and width divisible by 8, got 20x16x5; "
        r"set 'dataset.image_size=\[24,16,5\]'"
    )
    with pytest.raises(ShapeError, match=message):
        make_net()(make_volumes(20, 16, 5))


def test_pictures_are_refused():
    with pytest.raises(ShapeError, match=r"model=slice_mamba_unet takes 3D volumes"):
        make_net(**SMALL)(make_volumes(16, 16))


def test_widths_and_depths_that_do_not_go_together_are_refused():
    message = r"model\.depths: 3 scales do not go with the 2 of model\.widths"
    with pytest.raises(ConfigError, match=message):
        make_net(widths=(8, 16), depths=(0, 1, 1))
