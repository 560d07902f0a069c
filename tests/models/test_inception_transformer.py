"""The inception transformer against the published counts and its mixers written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.inception_transformer import (
    ATTENTION_HEADS,
    HighMixer,
    InceptionBlock,
    InceptionMixer,
    InceptionTransformer,
    LowMixer,
)

TINY = {"widths": (64, 64, 64, 96), "depths": (1, 1, 1, 1), "attention_heads": (1, 1, 1, 2)}
BASE = {
    "widths": (96, 192, 384, 512),
    "depths": (4, 6, 14, 6),
    "attention_heads": [1] * 4 + [3] * 6 + [8] * 7 + [10] * 7 + [15] * 6,
}


def count_parameters(**options):
    with torch.device("meta"):
        net = InceptionTransformer(in_channels=3, num_classes=1000, **options)
    return sum(parameter.numel() for parameter in net.parameters())


def build(**options):
    torch.manual_seed(0)
    return InceptionTransformer(in_channels=2, num_classes=3, **TINY, **options).eval()


@pytest.mark.parametrize(
    ("options", "count"), [({}, 19_866_344), (BASE, 47_866_216)], ids=["S", "B"]
)
def test_parameters_are_those_of_the_published_code(options, count):
    assert count_parameters(**options) == count


def test_multiply_adds_at_224_pixels_are_those_of_the_published_code():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        InceptionTransformer(in_channels=3, num_classes=1000).eval()(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(4.826, rel=0.001)


def test_heads_are_counted_from_the_first_block():
    with torch.device("meta"):
        stages = InceptionTransformer(in_channels=3, num_classes=2).stages
    blocks = [block for stage in stages for block in stage.blocks]
    assert tuple(b.attn.low_mixer.num_heads for b in blocks) == ATTENTION_HEADS
    pooled = [b.attn.low_mixer.is_pooled for b in blocks]
    assert pooled == [True] * 6 + [False] * 12


def test_high_mixer_convolves_one_half_and_pools_the_other():
    torch.manual_seed(0)
    mixer, features = HighMixer(4), torch.randn(1, 4, 3, 3)
    first, second = features[0, :2], features[0, 2:]
    wide = torch.einsum("chw,oc->ohw", first, mixer.conv1.weight[:, :, 0, 0])
    convolved = (wide * mixer.proj1.weight[:, 0]).sum((1, 2))
    pooled = mixer.proj2.weight[:, :, 0, 0] @ second.amax((1, 2)) + mixer.proj2.bias
    expected = F.gelu(torch.cat([convolved, pooled]))
    torch.testing.assert_close(mixer(features)[0, :, 1, 1], expected)


def attend(mixer, tokens):
    """(L, C) -> (L, C), a head after the other."""
    width = tokens.shape[1]
    query, key, value = (tokens @ mixer.qkv.weight.T + mixer.qkv.bias).split(width, dim=1)
    channels = torch.arange(width).chunk(mixer.num_heads)
    side = math.sqrt(width / mixer.num_heads)
    return torch.cat(
        [torch.softmax(query[:, c] @ key[:, c].T / side, 1) @ value[:, c] for c in channels], dim=1
    )


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (7, 7), (1, 1)])
def test_pooled_attention_is_among_means_of_the_pixels_that_exist(size):
    torch.manual_seed(0)
    mixer, features = LowMixer(8, 2, is_pooled=True), torch.randn(1, 8, *size)
    height, width = size
    corners = [(i, j) for i in range(0, height, 2) for j in range(0, width, 2)]
    means = [features[0, :, i : i + 2, j : j + 2].mean((1, 2)) for i, j in corners]
    expected = torch.empty(1, 8, *size)
    for (i, j), mixed in zip(corners, attend(mixer, torch.stack(means)), strict=True):
        expected[0, :, i : i + 2, j : j + 2] = mixed[:, None, None]
    torch.testing.assert_close(mixer(features), expected)


def test_attention_without_pooling_is_among_pixels():
    torch.manual_seed(0)
    mixer, features = LowMixer(8, 2, is_pooled=False), torch.randn(1, 8, 3, 5)
    expected = attend(mixer, features[0].flatten(1).T).T.reshape(1, 8, 3, 5)
    torch.testing.assert_close(mixer(features), expected)


def test_mixer_gives_the_first_channels_to_high_frequencies_and_fuses_all():
    torch.manual_seed(0)
    mixer, maps = InceptionMixer(96, 1, is_fine=True), torch.randn(2, 4, 4, 96)
    features = maps.permute(0, 3, 1, 2)
    high, low = mixer.high_mixer(features[:, :64]), mixer.low_mixer(features[:, 64:])
    joined = torch.cat([high, low], dim=1)
    fused = joined + F.conv2d(joined, mixer.conv_fuse.weight, padding=1, groups=160)
    expected = F.conv2d(fused, mixer.proj.weight, mixer.proj.bias).permute(0, 2, 3, 1)
    torch.testing.assert_close(mixer(maps), expected)


@pytest.mark.parametrize("is_fine", [True, False])
def test_block_scales_its_branches_in_coarse_stages_alone(is_fine):
    torch.manual_seed(0)
    block, maps = InceptionBlock(64, 1, 0.0, is_fine=is_fine), torch.randn(1, 4, 4, 64)
    scales = (1.0, 1.0)
    if not is_fine:
        assert torch.equal(block.scale1.scale, torch.full((64,), 1e-6))
        with torch.no_grad():
            block.scale1.scale.fill_(0.5)
            block.scale2.scale.fill_(0.25)
        scales = (0.5, 0.25)
    first, _, last = block.mlp
    mixed = maps + scales[0] * block.attn(F.layer_norm(maps, (64,), eps=1e-6))
    hidden = F.gelu(F.linear(F.layer_norm(mixed, (64,), eps=1e-6), first.weight, first.bias))
    expected = mixed + scales[1] * F.linear(hidden, last.weight, last.bias)
    assert hidden.shape[-1] == 256
    torch.testing.assert_close(block(maps), expected)


def test_position_embeddings_are_of_the_image_size():
    published = 96 * 56 * 56 + 192 * 28 * 28 + 320 * 14 * 14 + 384 * 7 * 7
    at_28_pixels = 96 * 7 * 7 + 192 * 4 * 4 + 320 * 2 * 2 + 384
    assert count_parameters(image_size=(28, 28)) == 19_866_344 - published + at_28_pixels


def test_position_embeddings_are_interpolated_at_other_sizes():
    net = build(image_size=(64, 64))
    stage, features = net.stages[0], torch.randn(1, 2, 32, 32)
    positions = stage.pos_embed.permute(0, 3, 1, 2)
    means = F.interpolate(positions, scale_factor=0.5, mode="bilinear")
    embedded = (stage.patch_embed(features) + means).permute(0, 2, 3, 1)
    torch.testing.assert_close(stage(features), stage.blocks(embedded).permute(0, 3, 1, 2))


@pytest.mark.parametrize("stage", range(4))
def test_logits_depend_on_the_positions(stage):
    net, images = build(image_size=(32, 32)), torch.randn(1, 2, 32, 32)
    with torch.no_grad():
        logits = net(images)
        positions = net.stages[stage].pos_embed
        positions.copy_(torch.randn_like(positions))
        assert (net(images) - logits).abs().max() > 0.01 * logits.abs().max()


def test_logits_depend_on_the_attention(monkeypatch):
    net, images = build(image_size=(64, 64)), torch.randn(2, 2, 64, 64)
    with torch.no_grad():
        logits = net(images)
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value: query)
        difference = net(images) - logits
    assert difference.abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("size", [(28, 28), (33, 50), (64, 32), (128, 128)])
def test_any_size_is_taken_whatever_the_one_that_it_is_built_for(size):
    for image_size in (None, size):
        assert build(image_size=image_size)(torch.zeros(2, 2, *size)).shape == (2, 3)


def test_volumes_are_refused():
    with pytest.raises(ShapeError, match=r"model=inception_transformer takes 2D images"):
        build()(torch.zeros(1, 2, 16, 16, 16))
    with pytest.raises(ShapeError, match="takes 2D images, got a size of 28x28x28"):
        build(image_size=(28, 28, 28))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (64, 64, 64, 90)}, r"model\.widths: 90 is not divisible by 32"),
        ({"depths": (1, 1, 1)}, r"model\.depths: 3 scales do not go with the 4"),
        ({"depths": (1, 1, 1, 2)}, r"model\.attention_heads: 4 blocks do not go with the 5"),
        ({"attention_heads": (1, 1, 1, 3)}, r"model\.attention_heads: 3 is not from 1 to 2"),
        ({"attention_heads": (0, 1, 1, 1)}, r"model\.attention_heads: 0 is not from 1 to 1"),
    ],
)
def test_widths_depths_and_heads_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        InceptionTransformer(in_channels=1, num_classes=2, **(TINY | options))
