"""MK-UNet against the published counts, its block and gate written out, and its attentions."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medlite import config
from medlite.errors import ConfigError, ShapeError
from medlite.models.mk_unet import GroupedAttentionGate, MKUNet, MultiKernelBlock

CONF = Path(__file__).parents[2] / "conf" / "model"
PUBLISHED = {
    "mk_unet_t": (27_384, 0.0496e9),
    "mk_unet_s": (93_050, 0.1044e9),
    "mk_unet": (315_566, 0.2780e9),
    "mk_unet_m": (1_150_166, 0.884e9),
    "mk_unet_l": (3_758_118, 3.067e9),
}
"""Parameters with the heads that are never returned, and multiply-adds at 256x256."""
TINY = (4, 4, 6, 8, 8)


def build(name):
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return config.build(node, in_channels=3, num_classes=1)


def with_lively_norms(module):
    """Statistics and scales that differ between channels, as after some training."""
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    return module.eval()


def norm(layer, maps):
    """The normalisation of evaluation, from its definition."""
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    shift = layer.bias - layer.running_mean * scale
    return maps * scale[:, None, None] + shift[:, None, None]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones_less_three_unused_heads(name):
    with torch.device("meta"):
        net = build(name)
    widths = yaml.safe_load((CONF / f"{name}.yaml").read_text())["widths"]
    unused = sum(width + 1 for width in widths[:3])
    published, _ = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in net.parameters()) == published - unused


def test_base_model_lacks_115_parameters_of_heads():
    with torch.device("meta"):
        net = MKUNet(in_channels=3, num_classes=1)
    assert sum(parameter.numel() for parameter in net.parameters()) == 315_566 - 115


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_at_256_pixels_are_those_of_the_published_code(name):
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        build(name).eval()(torch.empty(1, 3, 256, 256))
    _, published = PUBLISHED[name]
    assert counter.get_total_flops() / 2 == pytest.approx(published, rel=0.01)


def test_block_is_three_depthwise_kernels_summed_and_shuffled():
    block, maps = with_lively_norms(MultiKernelBlock(4, 6)), torch.randn(2, 4, 5, 7)
    conv, norm1, _ = block.expand
    hidden = norm(norm1, F.conv2d(maps, conv.weight)).clamp(0, 6)
    mixed = torch.zeros(2, 8, 5, 7)
    for kernel_size, (conv, layer_norm, _) in zip((1, 3, 5), block.branches, strict=True):
        assert conv.weight.shape == (8, 1, kernel_size, kernel_size)
        convolved = F.conv2d(hidden, conv.weight, padding=kernel_size // 2, groups=8)
        mixed = mixed + norm(layer_norm, convolved).clamp(0, 6)
    shuffled = mixed[:, [0, 4, 1, 5, 2, 6, 3, 7]]
    conv, norm2 = block.project
    expected = norm(norm2, F.conv2d(shuffled, conv.weight)) + F.conv2d(maps, block.shortcut.weight)
    torch.testing.assert_close(block(maps), expected)


def test_block_of_equal_widths_adds_its_input_itself():
    block, maps = MultiKernelBlock(4, 4).eval(), torch.randn(1, 4, 5, 5)
    nn.init.zeros_(block.project[-1].weight)
    assert torch.equal(block(maps), maps)


def test_gate_weights_the_pixels_of_the_skip_connection():
    gate = with_lively_norms(GroupedAttentionGate(4))
    features, skip = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)

    def grouped(layers, maps):
        conv, layer_norm = layers
        return norm(layer_norm, F.conv2d(maps, conv.weight, conv.bias, padding=1, groups=2))

    hidden = (grouped(gate.gate, features) + grouped(gate.skip, skip)).clamp(min=0)
    conv, layer_norm, _ = gate.score
    score = norm(layer_norm, F.conv2d(hidden, conv.weight, conv.bias))
    assert score.shape == (2, 1, 5, 6)
    torch.testing.assert_close(gate(features, skip), features + skip / (1 + (-score).exp()))


def test_network_is_its_layers_in_the_published_order():
    net = with_lively_norms(MKUNet(in_channels=2, num_classes=3, widths=TINY))
    images = torch.randn(2, 2, 64, 32)
    scales = [images]
    for encoder in net.encoders:
        scales.append(F.max_pool2d(encoder(scales[-1]), 2))
    features = scales.pop()
    for stage, decoder in enumerate(net.decoders):
        scores = net.channel_attentions[stage].scores
        means, maxima = F.adaptive_avg_pool2d(features, 1), F.adaptive_max_pool2d(features, 1)
        features = features * (scores(means) + scores(maxima)).sigmoid()
        summary = torch.stack([features.sum(1) / features.shape[1], features.max(1).values], 1)
        weight = net.spatial_attention.conv.weight
        features = decoder(features * F.conv2d(summary, weight, padding=3).sigmoid())
        features = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
        features = features.clamp(min=0)
        if stage < 4:
            features = net.gates[stage](features, scales.pop())
    torch.testing.assert_close(net(images), net.head(features))


def test_all_scales_share_one_spatial_attention():
    net = MKUNet(in_channels=1, num_classes=1, widths=TINY).eval()
    sizes = []
    net.spatial_attention.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[-1]))
    net(torch.zeros(1, 1, 64, 64))
    assert sizes == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("attention", ["channel_attentions", "spatial_attention"])
def test_logits_depend_on_the_attentions(attention):
    torch.manual_seed(0)
    net, images = (
        MKUNet(in_channels=1, num_classes=2, widths=TINY).eval(),
        torch.randn(1, 1, 32, 32),
    )
    logits = net(images)
    stand_in = (
        nn.ModuleList(nn.Identity() for _ in TINY) if "channel" in attention else nn.Identity()
    )
    setattr(net, attention, stand_in)
    assert (net(images) - logits).abs().max() > 0.01 * logits.abs().max()


def test_logits_depend_on_the_gates(monkeypatch):
    torch.manual_seed(0)
    net, images = (
        MKUNet(in_channels=1, num_classes=2, widths=TINY).eval(),
        torch.randn(1, 1, 32, 32),
    )
    logits = net(images)
    monkeypatch.setattr(GroupedAttentionGate, "forward", lambda _, features, skip: features + skip)
    assert (net(images) - logits).abs().max() > 0.01 * logits.abs().max()


def test_wrong_size_is_refused_with_one_that_works():
    net = MKUNet(in_channels=1, num_classes=1, widths=TINY).eval()
    message = "model=mk_unet needs sides divisible by 32, got 64x100; set dataset.image_size=128"
    with pytest.raises(ShapeError, match=message):
        net(torch.zeros(1, 1, 64, 100))
    assert net(torch.zeros(1, 1, 128, 128)).shape == (1, 1, 128, 128)


def test_widths_that_do_not_fit_are_refused():
    message = r"model\.widths: 2 widths, MKUNet has 5 scales\n.*model\.widths: 5 is not even"
    with pytest.raises(ConfigError, match=message):
        MKUNet(in_channels=1, num_classes=1, widths=(5, 8))
