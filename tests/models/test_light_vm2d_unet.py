"""The network in the style of Light-VM2D-UNet: what it costs, what it sees, what it refuses."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.layers.mamba2d import Mamba2D
from medlite.models.light_vm2d_unet import LightVM2DUNet

SMALL = {"widths": (8, 16), "depths": (0, 2)}


def make_net(**arguments):
    torch.manual_seed(0)
    return LightVM2DUNet(in_channels=1, num_classes=2, **arguments).eval()


def test_parameters_are_the_stated_144853():
    net = LightVM2DUNet(in_channels=3, num_classes=1)
    assert sum(parameter.numel() for parameter in net.parameters()) == 144_853


def test_multiply_adds_and_scans_at_256_pixels_are_the_stated_ones():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        LightVM2DUNet(in_channels=3, num_classes=1).eval()(torch.empty(1, 3, 256, 256))
    scan_flops = counter.get_flop_counts()["Global"][torch.ops.medlite.wavefront_scan]
    pixels_and_widths = [(64**2, 32), (32**2, 48), (16**2, 64)]
    assert scan_flops == sum(2 * n * c * (16 * 16 + 2) for n, c in pixels_and_widths)
    assert scan_flops == pytest.approx(0.10e9, rel=0.02)
    assert (counter.get_total_flops() - scan_flops) / 2 == pytest.approx(0.27e9, rel=0.01)


def test_states_reach_every_scan():
    net = make_net(d_state=3)
    assert {m.A_logs.shape[-1] for m in net.modules() if isinstance(m, Mamba2D)} == {3}


def test_blocks_read_forwards_and_backwards_in_turn():
    mixers = [m for m in make_net().modules() if isinstance(m, Mamba2D)]
    assert [mixer.reads_backwards for mixer in mixers] == [False, True] * 3


def test_two_blocks_let_every_pixel_of_a_map_see_all_others():
    net = make_net(**SMALL).double()
    blocks, maps = net.encoders[1].blocks, torch.randn(1, 6, 6, 16, dtype=torch.float64)
    for corner in [(0, 0), (0, 5), (5, 0), (5, 5)]:
        changed = maps.clone()
        changed[:, corner[0], corner[1]] *= -1
        assert ((blocks(changed) - blocks(maps)).abs().amax((0, 3)) > 0).all()


def test_other_scales_and_sides_that_differ_are_taken():
    net = make_net(widths=(8, 8, 16), depths=(1, 0, 1))
    assert net(torch.zeros(2, 1, 12, 20)).shape == (2, 2, 12, 20)


def test_wrong_size_is_refused_with_one_that_works():
    message = (
        "model=light_vm2d_unet needs sides divisible by 16, got 28x32; set dataset.image_size=32"
    )
    with pytest.raises(ShapeError, match=message):
        make_net()(torch.zeros(1, 1, 28, 32))


def test_volumes_are_refused():
    with pytest.raises(ShapeError, match=r"model=light_vm2d_unet takes 2D images"):
        make_net(**SMALL)(torch.zeros(1, 1, 16, 16, 16))


def test_widths_and_depths_that_do_not_go_together_are_refused_at_once():
    with pytest.raises(ConfigError) as raised:
        make_net(widths=(8, 12, 16), depths=(1, 1))
    assert raised.value.problems == (
        "model.depths: 2 scales do not go with the 3 of model.widths",
        "model.widths: 12 is not divisible by 8",
    )
