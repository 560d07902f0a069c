"""The Mix Transformer against published counts and its layers written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from medlite.errors import ConfigError
from medlite.models.layers.mit import (
    MixBlock,
    MixFFN,
    MixTransformer,
    PatchOverlap,
    ReducedAttention,
)

TINY = {"widths": (8, 16, 20, 16), "depths": (1, 1, 1, 1)}


def lively(layer):
    """Weights and biases that all matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize(
    ("widths", "depths", "count"),
    [
        ((32, 64, 160, 256), (2, 2, 2, 2), 3_319_392),
        ((64, 128, 320, 512), (2, 2, 2, 2), 13_151_424),
    ],
    ids=["B0", "B1"],
)
def test_parameters_are_those_of_the_published_encoders(widths, depths, count):
    with torch.device("meta"):
        net = MixTransformer(3, widths=widths, depths=depths)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


def test_scales_are_quarters_and_halves_rounded_up():
    scales = MixTransformer(2, **TINY)(torch.zeros(1, 2, 33, 64))
    expected = [(1, 8, 9, 16), (1, 16, 5, 8), (1, 20, 3, 4), (1, 16, 2, 2)]
    assert [tuple(scale.shape) for scale in scales] == expected


def test_scales_are_normalised():
    net = MixTransformer(2, **TINY)
    for scale in net(torch.randn(1, 2, 32, 32)):
        torch.testing.assert_close(scale.mean(1), torch.zeros_like(scale[:, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("stride", "side"), [(4, 7), (2, 3)])
def test_patches_overlap_by_a_convolution_of_twice_the_stride_less_one(stride, side):
    layer, images = lively(PatchOverlap(2, 8, stride)), torch.randn(1, 2, 9, 8)
    weight, bias = layer.proj.weight, layer.proj.bias
    assert weight.shape == (8, 2, side, side)
    padded = F.pad(images, [side // 2] * 4)
    corner = torch.einsum("ocij,cij->o", weight, padded[0, :, :side, :side]) + bias
    normalised = F.layer_norm(corner, (8,), layer.norm.weight, layer.norm.bias)
    torch.testing.assert_close(layer(images)[0, 0, 0], normalised)


@pytest.mark.parametrize("reduction", [1, 2])
def test_attention_is_a_softmax_over_reduced_pixels_in_every_head(reduction):
    layer, maps = lively(ReducedAttention(8, 2, reduction)), torch.randn(1, 4, 6, 8)
    context = maps
    if reduction > 1:
        sr, norm = layer.reduce.sr, layer.reduce.norm
        squares = maps.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        summed = torch.einsum("bhiwjc,ocij->bhwo", squares, sr.weight) + sr.bias
        context = F.layer_norm(summed, (8,), norm.weight, norm.bias)
    tokens, context = maps[0].reshape(24, 8), context[0].reshape(-1, 8)
    query = tokens @ layer.q.weight.T + layer.q.bias
    key = context @ layer.kv.weight[:8].T + layer.kv.bias[:8]
    value = context @ layer.kv.weight[8:].T + layer.kv.bias[8:]
    heads = [
        torch.softmax(query[:, h] @ key[:, h].T / math.sqrt(4), dim=-1) @ value[:, h]
        for h in (slice(0, 4), slice(4, 8))
    ]
    expected = torch.cat(heads, dim=-1) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(maps), expected.reshape(1, 4, 6, 8))


def test_pixels_that_fill_no_square_ask_but_do_not_answer():
    layer, maps = lively(ReducedAttention(8, 2, 2)), torch.randn(1, 5, 4, 8)
    changed = maps.clone()
    changed[:, 4] += 1
    before, after = layer(maps), layer(changed)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert (after[:, 4] - before[:, 4]).abs().max() > 0.01


def test_mix_ffn_convolves_its_hidden_channels_one_by_one():
    layer, maps = lively(MixFFN(4, 6)), torch.randn(1, 3, 3, 4)
    hidden = F.pad((maps @ layer.fc1.weight.T + layer.fc1.bias)[0], [0, 0, 1, 1, 1, 1])
    centre = torch.einsum("ijc,cij->c", hidden[1:4, 1:4], layer.dwconv.weight[:, 0])
    expected = F.gelu(centre + layer.dwconv.bias) @ layer.fc2.weight.T + layer.fc2.bias
    torch.testing.assert_close(layer(maps)[0, 1, 1], expected)


def test_block_is_attention_and_mix_ffn_both_normalised_and_residual():
    block, maps = lively(MixBlock(8, 2, 2, 0.0)), torch.randn(2, 4, 4, 8)
    mixed = maps + block.attn(F.layer_norm(maps, (8,), block.norm1.weight, block.norm1.bias, 1e-6))
    expected = mixed + block.mlp(
        F.layer_norm(mixed, (8,), block.norm2.weight, block.norm2.bias, 1e-6)
    )
    assert block.mlp.fc1.out_features == 32
    torch.testing.assert_close(block(maps), expected)


def test_heads_reductions_and_drop_rates_are_the_published_ones():
    with torch.device("meta"):
        blocks = [b for stage in MixTransformer(3).stages for b in stage.blocks]
    assert [b.attn.num_heads for b in blocks] == [1, 1, 2, 2, 5, 5, 8, 8]
    sides = [b.attn.reduce.sr.kernel_size[0] for b in blocks[:6]]
    assert sides == [8, 8, 4, 4, 2, 2]
    assert all(isinstance(b.attn.reduce, torch.nn.Identity) for b in blocks[6:])
    rates = torch.tensor([b.drop_path.rate for b in blocks], device="cpu")
    torch.testing.assert_close(rates, torch.linspace(0, 0.1, 8))


def test_depthwise_convolutions_are_drawn_by_their_own_fan_out():
    torch.manual_seed(0)
    block = MixTransformer(3).stages[3].blocks[0]
    assert block.mlp.dwconv.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.mlp.dwconv.bias.any()


@pytest.mark.parametrize(
    ("widths", "depths", "message"),
    [
        ((8, 16, 20), (1, 1, 1), r"model\.widths: 3 scales given, a MiT has 4"),
        ((8, 16, 24, 16), (1, 1, 1, 1), r"model\.widths: 24 channels .* shared by 5 heads"),
        ((8, 16, 20, 16), (1, 1, 1), r"model\.depths: 3 scales do not go with the 4"),
    ],
)
def test_wrong_scales_are_refused(widths, depths, message):
    with pytest.raises(ConfigError, match=message):
        MixTransformer(3, widths=widths, depths=depths)
