"""VM-UNet against the published code's counts and its wiring."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.vm_unet import VMUNet

SMALL = {"width": 8, "depths": (1, 1, 1, 1), "depths_decoder": (1, 1, 1, 1)}


def count_parameters(**arguments):
    with torch.device("meta"):
        net = VMUNet(in_channels=3, num_classes=1, **arguments)
    return sum(parameter.numel() for parameter in net.parameters())


def test_parameters_are_the_published_27_million():
    assert count_parameters() == 27_427_561


def test_depths_that_the_published_class_defaults_to_give_44_million():
    deeper = count_parameters(depths=(2, 2, 9, 2), depths_decoder=(2, 9, 2, 2))
    assert deeper == pytest.approx(44.27e6, abs=5e3)


def test_multiply_adds_at_256_pixels_are_those_of_the_published_code():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        VMUNet(in_channels=3, num_classes=1).eval()(torch.empty(1, 3, 256, 256))
    scan_flops = counter.get_flop_counts()["Global"][torch.ops.medlite.selective_scan]
    assert scan_flops == pytest.approx(2.985e9, rel=0.001)
    assert (counter.get_total_flops() - scan_flops) / 2 == pytest.approx(5.288e9, rel=0.001)


def test_decoder_stages_take_the_maps_that_entered_the_encoder_stages():
    net = VMUNet(in_channels=3, num_classes=1, **SMALL).eval()
    entered, left = {}, {}

    def remember(stage, inputs, output):
        entered[stage], left[stage] = inputs[0], output

    for stage in (*net.layers, *net.layers_up):
        stage.register_forward_hook(remember)
    net(torch.randn(1, 3, 32, 32))
    for step in (1, 2, 3):
        expected = left[net.layers_up[step - 1]] + entered[net.layers[4 - step]]
        assert torch.equal(entered[net.layers_up[step]], expected)


def test_one_channel_is_read_as_three_equal_ones():
    torch.manual_seed(0)
    gray, rgb = (VMUNet(in_channels=c, num_classes=2, **SMALL).eval() for c in (1, 3))
    rgb.load_state_dict(gray.state_dict())
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(gray(images), rgb(images.repeat(1, 3, 1, 1)))


def test_wrong_size_is_refused_with_one_that_works():
    net = VMUNet(in_channels=1, num_classes=1, **SMALL)
    message = "model=vm_unet needs sides divisible by 32, got 28x28; set dataset.image_size=32"
    with pytest.raises(ShapeError, match=message):
        net(torch.zeros(1, 1, 28, 28))


def test_volumes_are_refused():
    net = VMUNet(in_channels=1, num_classes=1, **SMALL)
    with pytest.raises(ShapeError, match=r"model=vm_unet takes 2D images"):
        net(torch.zeros(1, 1, 32, 32, 32))


def test_decoder_with_another_number_of_scales_is_refused():
    message = r"model\.depths_decoder: 2 scales do not go with the 4 of model\.depths"
    with pytest.raises(ConfigError, match=message):
        VMUNet(in_channels=1, num_classes=1, depths_decoder=(1, 1))
