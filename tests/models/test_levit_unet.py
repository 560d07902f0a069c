"""LeViT-UNet against the published code's counts, and what joins its parts, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.layers.levit import PlaceBias
from medlite.models.levit_unet import LeViTUNet

TINY = {
    "widths": (16, 24, 32),
    "depths": (1, 1, 1),
    "num_heads": (2, 3, 4),
    "key_dim": 8,
    "decoder_widths": (16, 12, 8),
}
VARIANTS = {
    "128s": {},
    "192": {
        "widths": (192, 288, 384),
        "depths": (4, 4, 4),
        "num_heads": (3, 5, 6),
        "key_dim": 32,
    },
    "384": {
        "widths": (384, 512, 768),
        "depths": (4, 4, 4),
        "num_heads": (6, 9, 12),
        "key_dim": 32,
    },
}


def make_tiny(image_size=(64, 64), **arguments):
    """With branches that are not nothing, as they are in a fresh net, and do not fade."""
    torch.manual_seed(0)
    facts = {"in_channels": 1, "num_classes": 3, "image_size": image_size}
    net = LeViTUNet(**{**facts, **TINY, **arguments})
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.normal_(std=(2 / layer.weight[0].numel()) ** 0.5)
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(std=0.1)
    return net.eval()


@pytest.mark.parametrize(
    ("variant", "num_classes", "expected"),
    [
        ("128s", 9, 15_904_715),
        ("128s", 1, 15_894_339),
        ("192", 9, 19_904_670),
        ("384", 9, 52_166_029),
    ],
)
def test_parameters_are_those_of_the_published_code(variant, num_classes, expected):
    with torch.device("meta"):
        net = LeViTUNet(in_channels=1, num_classes=num_classes, **VARIANTS[variant])
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


@pytest.mark.parametrize(
    ("variant", "expected"), [("128s", 17.556e9), ("192", 18.96e9), ("384", 25.64e9)]
)
def test_multiply_adds_at_224_pixels_are_those_of_the_published_code(variant, expected):
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        net = LeViTUNet(in_channels=1, num_classes=9, **VARIANTS[variant]).eval()
        assert net(torch.empty(1, 1, 224, 224)).shape == (1, 9, 224, 224)
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=0.001)


def test_stages_have_the_grids_and_the_sizes_of_the_published_code():
    with torch.device("meta"):
        net = LeViTUNet(in_channels=3, num_classes=9)
        biases = [m for m in net.modules() if isinstance(m, PlaceBias)]
    assert net.grids == [(14, 14), (7, 7), (4, 4)]
    assert [tuple(bias.attention_biases.shape) for bias in biases] == [
        *[(4, 196)] * 2, (8, 196), *[(6, 49)] * 3, (16, 49), *[(8, 16)] * 4,
    ]  # fmt: skip


@torch.no_grad()
def test_forward_joins_all_stages_and_then_the_activated_convolutions():
    net, images = make_tiny((112, 112), num_classes=5), torch.randn(2, 1, 112, 112)
    double = nn.UpsamplingBilinear2d(scale_factor=2)
    first = F.hardswish(net.stem[0](images))
    second = F.hardswish(net.stem[1](first))
    third = F.hardswish(net.stem[2](second))
    last = net.stem[3](third)
    tokens = [net.stages[0](last.flatten(2).transpose(1, 2))]
    tokens += [net.stages[1](tokens[0])]
    tokens += [net.stages[2](tokens[1])]
    sides = (7, 4, 2)
    maps = [t.transpose(1, 2).reshape(2, -1, s, s) for t, s in zip(tokens, sides, strict=True)]
    fit = nn.UpsamplingBilinear2d(size=(7, 7))
    features = torch.cat([last, maps[0], fit(double(maps[1])), fit(double(double(maps[2])))], 1)
    for decoder, skip in zip(net.decoders, (third, second, first), strict=True):
        features = double(features)
        for convolution, norm in (decoder.conv1, decoder.conv2):
            features = F.relu(norm(F.conv2d(features, convolution.weight, padding=1)))
        features = torch.cat([features, skip], dim=1)
    expected = double(F.conv2d(features, net.head.weight, net.head.bias, padding=1))
    torch.testing.assert_close(net(images), expected)


def test_third_stage_at_224_pixels_is_doubled_twice_before_it_is_fitted():
    net, features = make_tiny((224, 224)), torch.randn(1, 16, 14, 14)
    with torch.no_grad():
        _, middle, coarse = net._attend(features)
        tokens = net.stages[:2]
        tokens = tokens[1](tokens[0](features.flatten(2).transpose(1, 2)))
        maps = net.stages[2](tokens).transpose(1, 2).unflatten(2, (4, 4))
    for size in (8, 16, 14):
        maps = F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=True)
    assert middle.shape == (1, 24, 14, 14)
    torch.testing.assert_close(coarse, maps)


def _identity(query, key, value, attn_mask):
    return query.repeat_interleave(value.shape[-1] // query.shape[-1], dim=-1)


def _zero(query, key, value, attn_mask):
    return torch.zeros_like(_identity(query, key, value, attn_mask))


@pytest.mark.parametrize("stand_in", [_identity, _zero])
def test_logits_depend_on_the_attention(monkeypatch, stand_in):
    net, images = make_tiny(), torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        logits = net(images)
        monkeypatch.setattr(F, "scaled_dot_product_attention", stand_in)
        difference = net(images) - logits
    assert difference.abs().max() > 0.01 * logits.abs().max()


def test_logits_depend_on_the_biases_of_place():
    net, images = make_tiny(), torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        logits = net(images)
        for layer in net.modules():
            if isinstance(layer, PlaceBias):
                layer.attention_biases.normal_(std=3)
        difference = net(images) - logits
    assert difference.abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (64, 32), (80, 48), (128, 128)])
def test_all_sides_divisible_by_16_are_taken(size):
    logits = make_tiny(size)(torch.randn(1, 1, *size))
    assert logits.shape == (1, 3, *size)
    assert logits.isfinite().all()


def test_size_that_cannot_be_halved_is_refused_with_one_that_can():
    message = r"model=levit_unet needs sides divisible by 16, got 28x28; set dataset.image_size=32"
    with pytest.raises(ShapeError, match=message):
        make_tiny((28, 28))


def test_another_size_than_that_of_the_network_is_refused():
    with pytest.raises(ShapeError, match="model=levit_unet was built for 64x64 images, got 32x64"):
        make_tiny((64, 64))(torch.zeros(1, 1, 32, 64))


def test_volumes_are_refused():
    with pytest.raises(ShapeError, match="model=levit_unet takes 2D images"):
        make_tiny((16, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1)}, r"model\.depths: \[1, 1\] are not of three stages"),
        ({"widths": (16, 20, 32)}, r"model\.widths: 20 is not divisible by model\.key_dim=8"),
        ({"widths": (20, 24, 32), "key_dim": 4}, r"model\.widths: 20 is not divisible by 8"),
    ],
)
def test_widths_and_stages_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_tiny(**arguments)
