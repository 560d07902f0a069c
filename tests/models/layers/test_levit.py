"""LeViT's layers against timm's, which were written by others, and against loops."""

import pytest
import torch
from timm.models import levit as timm_levit
from torch import nn

from medlite.models.layers.levit import (
    LevitAttention,
    LinearNorm,
    PlaceBias,
    ShrinkingAttention,
    levit_mlp,
)

GRID = (3, 5)


def with_weights_of(layer, reference):
    """Both draw, then `layer` gets what `reference` has, in the order in which they define it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_()
        for name, buffer in reference.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    names = {
        "bias.attention_biases": "attention_biases",
        "proj.1.linear.": "proj.ln.linear.",
        "proj.1.norm.": "proj.ln.bn.",
        ".norm.": ".bn.",
        "q.linear": "q.ln.linear",
        "q.bn": "q.ln.bn",
    }
    weights = {}
    for key in layer.state_dict():
        source = key
        for ours, theirs in names.items():
            if not (source.startswith(("kv.", "qkv.")) and ours.startswith("q.")):
                source = source.replace(ours, theirs)
        weights[key] = reference.state_dict()[source]
    layer.load_state_dict(weights)
    return layer


@pytest.mark.parametrize("is_training", [False, True])
def test_attention_equals_that_of_timm(is_training):
    reference = timm_levit.Attention(
        12, 4, num_heads=3, attn_ratio=2, resolution=GRID, act_layer=nn.Hardswish
    )
    layer = LevitAttention(12, num_heads=3, key_dim=4, value_ratio=2, grid=GRID)
    with_weights_of(layer, reference)
    tokens = torch.randn(2, 15, 12)
    reference.train(is_training)
    layer.train(is_training)
    torch.testing.assert_close(layer(tokens), reference(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_training", [False, True])
def test_shrinking_attention_equals_that_of_timm(is_training):
    reference = timm_levit.AttentionDownsample(
        12, 10, 4, num_heads=3, attn_ratio=4, resolution=GRID, act_layer=nn.Hardswish
    )
    layer = ShrinkingAttention(12, 10, num_heads=3, key_dim=4, value_ratio=4, grid=GRID)
    with_weights_of(layer, reference)
    tokens = torch.randn(2, 15, 12)
    reference.train(is_training)
    layer.train(is_training)
    assert layer(tokens).shape == (2, 6, 10)
    torch.testing.assert_close(layer(tokens), reference(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_place_bias_is_one_number_for_each_pair_of_distances(stride):
    height, width = GRID
    layer = PlaceBias(2, GRID, stride=stride)
    with torch.no_grad():
        layer.attention_biases.normal_()
    expected = [
        layer.attention_biases[:, abs(row - key_row) * width + abs(column - key_column)]
        for row in range(0, height, stride)
        for column in range(0, width, stride)
        for key_row in range(height)
        for key_column in range(width)
    ]
    assert torch.equal(layer().flatten(1), torch.stack(expected, dim=1))


def test_linear_norm_normalises_each_channel_over_all_tokens_of_all_images():
    torch.manual_seed(0)
    layer, tokens = LinearNorm(6, 4), torch.randn(3, 5, 6)
    mapped = tokens @ layer.linear.weight.T
    centred = mapped - mapped.mean((0, 1))
    expected = centred / (centred.square().mean((0, 1)) + 1e-5).sqrt()
    torch.testing.assert_close(layer(tokens), expected)


def test_residual_branches_start_as_nothing():
    tokens = torch.randn(2, 15, 8)
    attention = LevitAttention(8, num_heads=2, key_dim=4, value_ratio=2, grid=GRID)
    assert torch.equal(levit_mlp(8, 2)(tokens), tokens)
    assert not attention(tokens).any()
