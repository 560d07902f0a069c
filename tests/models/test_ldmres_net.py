"""LDMRes-Net-style: its size near the paper's, and its block written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ShapeError
from medlite.models.ldmres_net import DualMultiscaleBlock, LDMResNet

TINY = (2, 3, 4)


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def test_parameters_are_as_few_as_the_paper_says():
    net = LDMResNet(in_channels=3, num_classes=1)
    assert count(net) == 71_329
    assert count(net) == pytest.approx(0.072e6, rel=0.02)


def test_parameters_follow_from_the_widths():
    def block(narrow, wide):
        return narrow * wide * (9 + 1 + 1) + 2 * 9 * wide**2 + 4 * 2 * wide

    net = LDMResNet(in_channels=2, num_classes=5, widths=TINY)
    encoder = block(2, 2) + block(2, 3) + block(3, 4)
    decoder = block(3 + 4, 3) + block(2 + 3, 2)
    assert count(net) == encoder + decoder + 2 * 5 + 5


def test_multiply_adds_at_640_pixels_are_as_documented():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        LDMResNet(in_channels=3, num_classes=1).eval()(torch.empty(1, 3, 640, 640))
    assert counter.get_total_flops() / 2 == pytest.approx(4.516e9, rel=0.001)


def test_block_adds_two_paths_and_a_shortcut():
    torch.manual_seed(0)
    block, maps = DualMultiscaleBlock(3, 4).eval(), torch.randn(2, 3, 5, 6)
    norm = (1 + 1e-5) ** 0.5

    def path(layers, padding):
        hidden = (F.conv2d(maps, layers[0].weight, padding=padding) / norm).clamp(min=0)
        return F.conv2d(hidden, layers[3].weight, padding=1) / norm

    shortcut = F.conv2d(maps, block.shortcut.weight)
    expected = (path(block.wide, 1) + path(block.narrow, 0) + shortcut).clamp(min=0)
    torch.testing.assert_close(block(maps), expected)


def test_paths_see_five_and_three_pixels():
    torch.manual_seed(0)
    block, maps = DualMultiscaleBlock(1, 2).eval(), torch.ones(1, 1, 9, 9, requires_grad=True)
    for path, reach in ((block.wide, 5), (block.narrow, 3)):
        last = path[3]
        hidden = F.conv2d(maps, path[0].weight, padding=path[0].padding)
        centre = F.conv2d(hidden, last.weight, padding=last.padding)[0, 0, 4, 4]
        (gradient,) = torch.autograd.grad(centre, maps)
        assert (gradient[0, 0, 4] != 0).sum() == reach


def test_skip_connections_reach_the_decoder():
    torch.manual_seed(0)
    net, images = (
        LDMResNet(in_channels=1, num_classes=1, widths=TINY).eval(),
        torch.randn(1, 1, 8, 8),
    )
    scales = [net.stem(images)]
    for encoder in net.encoders:
        scales.append(encoder(F.max_pool2d(scales[-1], 2)))
    fine, middle, coarse = scales
    up = {"scale_factor": 2, "mode": "bilinear", "align_corners": False}
    features = net.decoders[0](torch.cat([F.interpolate(coarse, **up), middle], 1))
    features = net.decoders[1](torch.cat([F.interpolate(features, **up), fine], 1))
    torch.testing.assert_close(net(images), net.head(features))


def test_wrong_size_is_refused_with_one_that_works():
    net = LDMResNet(in_channels=1, num_classes=1).eval()
    message = "model=ldmres_net needs sides divisible by 8, got 28x20; set dataset.image_size=32"
    with pytest.raises(ShapeError, match=message):
        net(torch.zeros(1, 1, 28, 20))
    assert net(torch.zeros(1, 1, 32, 32)).shape == (1, 1, 32, 32)
