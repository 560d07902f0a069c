"""ESPNet against the published counts, and its pyramid written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.espnet import Encoder, ESPNet, ESPNetC, Pyramid

PUBLISHED = {
    "espnet": (ESPNet, 365_109),
    "espnet_c": (ESPNetC, 349_449),
}
SMALL = {"depths": (1, 1)}


def with_lively_norms(module):
    """Statistics and scales that differ between channels, as after some training."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    return module.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    network, published = PUBLISHED[name]
    with torch.device("meta"):
        net = network(in_channels=3, num_classes=20)
    assert sum(parameter.numel() for parameter in net.parameters()) == published


def test_multiply_adds_at_512x1024_pixels_are_those_of_the_published_code():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        ESPNet(in_channels=3, num_classes=20).eval()(torch.empty(1, 3, 512, 1024))
    assert counter.get_total_flops() / 2 == pytest.approx(4.780e9, rel=0.001)


@pytest.mark.parametrize(
    ("widths", "stride", "is_residual"),
    [((13, 13), 1, True), ((6, 13), 1, False), ((6, 13), 2, False)],
)
def test_pyramid_sums_up_its_dilations_from_the_second_on(widths, stride, is_residual):
    torch.manual_seed(0)
    pyramid = Pyramid(*widths, stride=stride, is_residual=is_residual).eval()
    maps = torch.randn(2, widths[0], 8, 12)
    reduced = F.conv2d(maps, pyramid.reduce.weight, stride=stride, padding=stride - 1)
    dilated = [
        F.conv2d(reduced, branch.weight, padding=dilation, dilation=dilation)
        for dilation, branch in zip((1, 2, 4, 8, 16), pyramid.branches, strict=True)
    ]
    assert [maps.shape[1] for maps in dilated] == [5, 2, 2, 2, 2]
    sums = [sum(dilated[2 : last + 1], dilated[1]) for last in range(1, 5)]
    expected = torch.cat([dilated[0], *sums], 1) + (maps if is_residual else 0)
    expected = expected / (1 + 1e-3) ** 0.5
    expected = torch.where(expected > 0, expected, 0.25 * expected)
    torch.testing.assert_close(pyramid(maps), expected)


def test_encoder_joins_the_image_at_a_half_and_at_a_quarter_of_the_size():
    torch.manual_seed(0)
    encoder, images = Encoder(2, (1, 1)).eval(), torch.rand(1, 2, 16, 24)
    level1, level2, level3 = encoder(images)
    half = F.conv2d(images, torch.eye(2)[:, :, None, None].expand(2, 2, 3, 3) / 9, None, 2, 1)
    quarter = F.conv2d(half, torch.eye(2)[:, :, None, None].expand(2, 2, 3, 3) / 9, None, 2, 1)
    norm = (1 + 1e-3) ** 0.5
    torch.testing.assert_close(level1[:, 16:], half / norm)
    torch.testing.assert_close(level2[:, 128:], quarter / norm)
    assert level3.shape == (1, 256, 2, 3)


def test_stages_are_joined_with_what_they_start_from():
    torch.manual_seed(0)
    encoder, images = Encoder(2, (1, 2)).eval(), torch.rand(1, 2, 16, 24)
    level1, level2, level3 = encoder(images)
    start2, start3 = encoder.shrink2(level1), encoder.shrink3(level2)
    _, prelu2 = encoder.norm_act2
    _, prelu3 = encoder.norm_act3
    norm = (1 + 1e-3) ** 0.5
    joined2 = F.prelu(torch.cat([encoder.stage2(start2), start2], 1) / norm, prelu2.weight[:128])
    joined3 = F.prelu(torch.cat([start3, encoder.stage3(start3)], 1) / norm, prelu3.weight)
    torch.testing.assert_close(level2[:, :128], joined2)
    torch.testing.assert_close(level3, joined3)


def test_decoder_is_its_layers_in_the_published_order():
    torch.manual_seed(0)
    net = with_lively_norms(ESPNet(in_channels=1, num_classes=2, decoder_width=7, **SMALL))
    images = torch.randn(2, 1, 8, 16)
    level1, level2, level3 = net.encoder(images)

    def doubled(layer, maps):
        squares = torch.einsum("bchw,cdij->bdhiwj", maps, layer.weight)
        return squares.flatten(4).flatten(2, 3)

    coarse = doubled(net.upsample3, net.norm3(net.reduce3(level3)))
    middle = net.merge2(torch.cat([net.reduce2(level2), coarse], 1))
    middle = net.upsample2[1](doubled(net.upsample2[0], middle))
    fine = net.merge1(torch.cat([middle, level1], 1))
    torch.testing.assert_close(net(images), doubled(net.head, fine), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_classes", [1, 2, 5, 23])
@pytest.mark.parametrize("network", [ESPNet, ESPNetC])
def test_any_number_of_classes_is_taken(network, num_classes):
    net = network(in_channels=1, num_classes=num_classes, **SMALL).eval()
    assert net(torch.zeros(1, 1, 8, 16)).shape == (1, num_classes, 8, 16)


@pytest.mark.parametrize(("name", "network"), [("espnet", ESPNet), ("espnet_c", ESPNetC)])
def test_wrong_size_is_refused_with_one_that_works(name, network):
    net = network(in_channels=1, num_classes=1, **SMALL).eval()
    message = f"model={name} needs sides divisible by 8, got 28x20; set dataset.image_size=32"
    with pytest.raises(ShapeError, match=message):
        net(torch.zeros(1, 1, 28, 20))
    assert net(torch.zeros(1, 1, 32, 32)).shape == (1, 1, 32, 32)


def test_decoder_without_a_channel_for_each_dilation_is_refused():
    with pytest.raises(ConfigError, match=r"model\.decoder_width: 4 is less than 5"):
        ESPNet(in_channels=1, num_classes=1, decoder_width=4)
