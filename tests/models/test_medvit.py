"""MedViT against the published code's counts, and its blocks written out layer by layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.medvit import ECB, LTB, LocalFeedForward, MedViT, PooledAttention

TINY = {"width": 24, "head_dim": 8, "depths": (1, 2, 5, 1)}
SIZES = {"small": (3, 4, 10, 3), "base": (3, 4, 20, 3), "large": (3, 4, 30, 3)}


def make_tiny(**arguments):
    torch.manual_seed(0)
    return MedViT(**{"in_channels": 3, "num_classes": 4, **TINY, **arguments})


def with_lively_layers(net):
    """Weights that let every branch matter, unlike the small ones of a fresh net."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.normal_(std=layer.weight[0].numel() ** -0.5)
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(std=0.1)
                layer.running_mean.normal_(std=0.1)
    return net


@pytest.mark.parametrize(
    ("size", "num_classes", "expected"),
    [
        ("small", 1000, 32_161_440),
        ("small", 9, 31_145_665),
        ("base", 1000, 45_430_972),
        ("large", 1000, 58_700_504),
    ],
)
def test_parameters_are_those_of_the_published_code(size, num_classes, expected):
    with torch.device("meta"):
        net = MedViT(in_channels=3, num_classes=num_classes, depths=SIZES[size])
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


def test_multiply_adds_at_224_pixels_are_those_of_the_published_code():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        MedViT(in_channels=3, num_classes=1000).eval()(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(5.858e9, rel=0.001)


def test_blocks_of_the_stages_are_those_of_the_published_code():
    with torch.device("meta"):
        net = MedViT(in_channels=3, num_classes=2)
    blocks = [(type(block), block.out_channels) for block in net.features]
    third = [(ECB, 384)] * 4 + [(LTB, 512)]
    assert blocks == [
        *[(ECB, 96)] * 3,
        *[(ECB, 192)] * 3,
        (LTB, 256),
        *third * 2,
        *[(ECB, 768)] * 2,
        (LTB, 1024),
    ]


def test_stochastic_depth_rises_to_its_rate_and_is_shared_by_the_two_parts_of_a_block():
    net = make_tiny(drop_path_rate=0.4)
    first, last = net.features[0], net.features[-1]
    assert first.drop_path.rate == 0
    assert last.attention_drop_path.rate == pytest.approx(0.3)
    assert last.convolution_drop_path.rate == pytest.approx(0.1)


def test_feed_forward_widens_convolves_weights_and_narrows():
    torch.manual_seed(0)
    layer, maps = with_lively_layers(LocalFeedForward(4, 3)).eval(), torch.randn(2, 4, 5, 6)
    widen, norm1, _, depthwise, norm2, _, gate, narrow, norm3 = layer.conv
    hidden = F.hardswish(norm1(F.conv2d(maps, widen.weight)))
    hidden = F.hardswish(norm2(F.conv2d(hidden, depthwise.weight, padding=1, groups=12)))
    squeeze, _, excite, _ = gate.fc
    summary = F.relu(F.linear(hidden.mean((2, 3)), squeeze.weight, squeeze.bias))
    weights = F.relu6(F.linear(summary, excite.weight, excite.bias) + 3) / 6
    expected = maps + norm3(F.conv2d(hidden * weights[..., None, None], narrow.weight))
    assert summary.shape == (2, 3)
    torch.testing.assert_close(layer(maps), expected)


@pytest.mark.parametrize(
    ("num_tokens", "groups"),
    [(32, [(0, 16), (16, 32)]), (20, [(0, 16), (16, 20)]), (4, [(0, 4)])],
    ids=["full groups", "last group not full", "fewer tokens than a group"],
)
def test_keys_and_values_are_of_means_of_consecutive_tokens(num_tokens, groups):
    torch.manual_seed(0)
    layer = with_lively_layers(PooledAttention(8, 4, 16)).eval()
    tokens = torch.randn(2, num_tokens, 8)
    means = torch.stack([tokens[:, start:stop].mean(1) for start, stop in groups], dim=2)
    pooled = layer.norm(means).transpose(1, 2)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        query, key, value = layer.q(tokens), layer.k(pooled), layer.v(pooled)
        scores = query[..., head] @ key[..., head].transpose(1, 2) / 2
        heads.append(scores.softmax(-1) @ value[..., head])
    torch.testing.assert_close(layer(tokens), layer.proj(torch.cat(heads, dim=-1)))


def test_convolution_block_is_a_grouped_convolution_and_a_feed_forward_on_halved_maps():
    torch.manual_seed(0)
    block = with_lively_layers(ECB(4, 8, 4, 0.0, stride=2)).eval()
    maps = torch.randn(2, 4, 4, 6)
    _, embed, norm = block.patch_embed
    halved = norm(F.conv2d(F.avg_pool2d(maps, 2), embed.weight))
    grouped, norm, _, mix = block.mhca
    local = F.relu(norm(F.conv2d(halved, grouped.weight, padding=1, groups=2)))
    mixed = halved + F.conv2d(local, mix.weight)
    torch.testing.assert_close(block(maps), mixed + block.conv(block.norm(mixed)))


def test_transformer_block_attends_then_convolves_a_quarter_then_feeds_both_forward():
    torch.manual_seed(0)
    block = with_lively_layers(LTB(4, 12, 4, 0.0, pooled_side=2, stride=1)).eval()
    maps = torch.randn(2, 4, 4, 6)
    embedded = block.patch_embed(maps)
    tokens = block.norm1(embedded).permute(0, 2, 3, 1).reshape(2, 24, 12)
    attended = embedded + block.e_mhsa(tokens).reshape(2, 4, 6, 12).permute(0, 3, 1, 2)
    local = block.projection(attended)
    joined = torch.cat([attended, local + block.mhca(local)], dim=1)
    assert joined.shape == (2, 16, 4, 6)
    torch.testing.assert_close(block(maps), joined + block.conv(block.norm2(joined)))


@pytest.mark.parametrize(
    "stand_in",
    [lambda query, *_: query, lambda query, *_: torch.zeros_like(query)],
    ids=["identity", "zero"],
)
def test_logits_depend_on_the_attention(monkeypatch, stand_in):
    net, images = with_lively_layers(make_tiny()).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = net(images)
        monkeypatch.setattr(F, "scaled_dot_product_attention", stand_in)
        difference = net(images) - logits
    assert difference.abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("is_training", [False, True])
def test_every_normalisation_is_applied_once_also_while_exporting(monkeypatch, is_training):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    net, applied = make_tiny().train(is_training), []
    layers = [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: applied.append(layer))
    net(torch.randn(2, 3, 32, 32))
    assert len(layers) > 50
    assert sorted(map(id, applied)) == sorted(map(id, layers))


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (33, 50), (64, 64), (128, 128), (16, 16)])
def test_any_size_is_taken(size):
    net = make_tiny(in_channels=1).eval()
    logits = net(torch.randn(2, 1, *size))
    assert logits.shape == (2, 4)
    assert logits.isfinite().all()


def test_volumes_are_refused():
    with pytest.raises(ShapeError, match=r"model=medvit takes 2D images"):
        make_tiny()(torch.zeros(1, 3, 16, 16, 16))


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"model\.width: 64 is not divisible by three heads"):
        MedViT(in_channels=1, num_classes=2, width=64)


@pytest.mark.parametrize("depths", [(3, 4, 12, 3), (3, 4, 10), (0, 1, 5, 1)])
def test_depths_that_the_stages_cannot_have_are_refused(depths):
    with pytest.raises(ConfigError, match=r"model\.depths: .* are not four stages .*multiple of 5"):
        make_tiny(depths=depths)
