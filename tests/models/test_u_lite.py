"""U-Lite against the published counts, and its parts written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.u_lite import AxialConv, ULite

TINY = (4, 4, 8)


def with_lively_norms(module):
    """Statistics and scales that differ between channels, as after some training."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    return module.eval()


def test_parameters_are_the_published_878417():
    with torch.device("meta"):
        net = ULite(in_channels=3, num_classes=1)
    assert sum(parameter.numel() for parameter in net.parameters()) == 878_417


def test_multiply_adds_at_256_pixels_are_those_of_the_published_code():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        ULite(in_channels=3, num_classes=1).eval()(torch.empty(1, 3, 256, 256))
    assert counter.get_total_flops() / 2 == pytest.approx(0.7365e9, rel=0.001)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(7, 1), (3, 2), (3, 3)])
def test_axial_convolution_is_one_with_a_cross_of_weights_and_a_one_in_the_middle(
    kernel_size, dilation
):
    torch.manual_seed(0)
    layer, maps = AxialConv(3, kernel_size, dilation), torch.randn(2, 3, 9, 11)
    middle = kernel_size // 2
    cross = torch.zeros(3, 1, kernel_size, kernel_size)
    cross[:, :, :, middle] += layer.vertical.weight[:, :, :, 0]
    cross[:, :, middle, :] += layer.horizontal.weight[:, :, 0, :]
    cross[:, :, middle, middle] += 1
    bias = layer.vertical.bias + layer.horizontal.bias
    reach = middle * dilation
    expected = F.conv2d(maps, cross, bias, padding=reach, dilation=dilation, groups=3)
    torch.testing.assert_close(layer(maps), expected)


def test_network_is_its_layers_in_the_published_order():
    torch.manual_seed(0)
    net = with_lively_norms(ULite(in_channels=2, num_classes=3, widths=(4, 8)))
    (encoder,), (decoder,), middle = net.encoders, net.decoders, net.bottleneck
    images = torch.randn(2, 2, 6, 10)
    skip = encoder.norm(encoder.axial(F.conv2d(images, net.stem.weight, net.stem.bias, padding=3)))
    features = F.gelu(F.max_pool2d(encoder.widen(skip), 2))
    narrow = middle.narrow(features)
    assert [branch.vertical.dilation for branch in middle.branches] == [(1, 1), (2, 2), (3, 3)]
    joined = torch.cat([narrow, *(branch(narrow) for branch in middle.branches)], 1)
    features = F.gelu(middle.mix(middle.norm(joined)))
    doubled = features.repeat_interleave(2, 2).repeat_interleave(2, 3)
    narrow = decoder.norm(decoder.narrow(torch.cat([doubled, skip], 1)))
    expected = net.head(F.gelu(decoder.mix(decoder.axial(narrow))))
    torch.testing.assert_close(net(images), expected)


def test_wrong_size_is_refused_with_one_that_works():
    net = ULite(in_channels=1, num_classes=1).eval()
    message = "model=u_lite needs sides divisible by 32, got 32x40; set dataset.image_size=64"
    with pytest.raises(ShapeError, match=message):
        net(torch.zeros(1, 1, 32, 40))
    assert net(torch.zeros(1, 1, 64, 64)).shape == (1, 1, 64, 64)


def test_sides_are_divided_once_per_scale():
    net = ULite(in_channels=1, num_classes=1, widths=TINY).eval()
    assert net(torch.zeros(1, 1, 4, 12)).shape == (1, 1, 4, 12)


def test_wrong_widths_and_kernels_are_refused():
    message = (
        r"model\.widths: the last, 10, is not divisible by 4\n.*model\.kernel_size: 6 is not odd"
    )
    with pytest.raises(ConfigError, match=message):
        ULite(in_channels=1, num_classes=1, widths=(4, 10), kernel_size=6)
