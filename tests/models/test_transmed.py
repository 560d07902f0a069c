"""TransMed-style classifier: sizes of its parts, its patches as loops, and what it refuses."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.transmed import TransMed

SMALL = {"trunk": "test_resnet", "encoder": "test_vit"}


def build_small(in_channels, **arguments):
    torch.manual_seed(0)
    return TransMed(in_channels=in_channels, num_classes=5, **SMALL, **arguments).eval()


def make_images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_parameters_are_those_of_the_parts():
    with torch.device("meta"):
        net = TransMed(in_channels=3, num_classes=2)
    layer = 4 * 192**2 + 4 * 192 + 2 * 4 * 192**2 + 5 * 192 + 4 * 192
    around = 192 * (512 + 1) + 192 + 17 * 192 + 2 * 192 + 2 * (192 + 1)
    expected = 11_176_512 + 12 * layer + around
    assert sum(parameter.numel() for parameter in net.parameters()) == expected == 16_617_602


@pytest.mark.parametrize(
    ("trunk", "encoder", "published"),
    [
        ("resnet18", "deit_tiny_patch16_224", 17e6),
        ("resnet34", "deit_small_patch16_224", 43e6),
        ("resnet50", "deit_base_patch16_224", 110e6),
        ("resnet152", "deit_base_patch16_224", 145e6),
    ],
)
def test_parameters_of_the_variants_round_to_those_of_the_paper(trunk, encoder, published):
    with torch.device("meta"):
        net = TransMed(in_channels=3, num_classes=2, trunk=trunk, encoder=encoder)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(published, abs=0.5e6)


def test_multiply_adds_at_224_pixels():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        TransMed(in_channels=3, num_classes=2).eval()(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(2.158e9, rel=0.001)


@pytest.mark.parametrize("in_channels", [1, 2, 3, 4, 7])
def test_groups_are_matching_patches_of_three_channels(in_channels):
    images = make_images(2, in_channels, 8, 12)
    groups = -(-in_channels // 3)
    patches = build_small(in_channels).group_patches(images)
    assert patches.shape == (2 * groups * 16, 3, 2, 3)
    places = torch.cartesian_prod(*map(torch.arange, (2, groups, 4, 4))).tolist()
    for patch, (image, group, row, column) in zip(patches, places, strict=True):
        for colour in range(3):
            channel = images[image, (3 * group + colour) % in_channels]
            expected = channel[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            assert torch.equal(patch[colour], expected)


def test_logits_are_those_of_the_class_token_after_the_encoder():
    net, images = build_small(4), make_images(2, 4, 32, 32)
    with torch.no_grad():
        features = [net.trunk(patch[None]) for patch in net.group_patches(images)]
        tokens = net.proj(torch.cat(features)).reshape(2, 32, -1)
        sequence = torch.cat([net.cls_token.repeat(2, 1, 1), tokens], 1) + net.pos_embed
        for block in net.blocks:
            sequence = block(sequence)
        expected = net.head(net.norm(sequence)[:, 0])
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [28, 32, 64, 128, 224])
@pytest.mark.parametrize("in_channels", [1, 2, 3, 4, 7])
def test_any_number_of_channels_and_the_usual_sizes_are_taken(in_channels, side):
    with torch.no_grad():
        logits = build_small(in_channels)(make_images(2, in_channels, side, side))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


def test_class_token_sees_the_patches_through_the_attention_alone(monkeypatch):
    net, images = build_small(2), make_images(2, 2, 32, 32)
    with torch.no_grad():
        logits = net(images)
        assert (logits[0] - logits[1]).abs().max() > 1e-4
        for block in net.blocks:
            monkeypatch.setattr(block.attn, "forward", lambda tokens, **_: tokens)
        blind = net(images)
    torch.testing.assert_close(blind[0], blind[1])
    assert (blind - logits).abs().max() > 0.01 * logits.abs().max()


def test_size_that_patches_do_not_divide_is_refused_with_one_that_they_do():
    message = "model=transmed needs sides divisible by 4, got 30x28; set dataset.image_size=32"
    with pytest.raises(ShapeError, match=message):
        build_small(1)(torch.zeros(1, 1, 30, 28))


def test_volumes_are_refused():
    with pytest.raises(ShapeError, match=r"model=transmed takes 2D images"):
        build_small(1)(torch.zeros(1, 1, 32, 32, 32))


def test_no_patches_are_refused():
    with pytest.raises(ConfigError, match=r"model\.patches_per_side: 0 is less than 1"):
        build_small(1, patches_per_side=0)


def test_trunk_of_one_size_is_refused():
    with pytest.raises(ConfigError, match=r"model\.trunk: 'test_vit' takes one image size alone"):
        TransMed(in_channels=1, num_classes=2, trunk="test_vit", encoder="test_vit")


def test_encoder_that_is_no_vision_transformer_is_refused():
    problem = (
        r"model\.encoder: 'test_resnet' is no vision transformer with a class token; take deit"
    )
    with pytest.raises(ConfigError, match=problem):
        TransMed(in_channels=1, num_classes=2, trunk="test_resnet", encoder="test_resnet")


def test_unknown_networks_are_refused():
    for part in ("trunk", "encoder"):
        with pytest.raises(ConfigError, match=rf"model\.{part}: timm has no network 'resnet_18'"):
            TransMed(in_channels=1, num_classes=2, **{**SMALL, part: "resnet_18"})
