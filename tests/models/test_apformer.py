"""APFormer against the published counts, its masks as loops, and what the gather saves."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.apformer import APFormer, GaussianPosition, PrunedAttention, PrunedLayer

SMALL = {
    "image_size": (64, 32),
    "widths": (4, 8, 8, 12),
    "depth": 2,
    "num_heads": 2,
    "head_dim": 4,
    "mlp_width": 16,
}


def build_small(**arguments):
    torch.manual_seed(0)
    net = APFormer(in_channels=2, num_classes=3, **SMALL, **arguments).eval()
    with torch.no_grad():
        for layer in net.layers:
            layer.attention.out.weight.mul_(10)
            layer.classifier.weight.mul_(3)
    return net


def build_layer():
    return PrunedLayer(PrunedAttention(8, (4, 6), 2, 4), 8, 16)


def make_images():
    return torch.randn(3, 2, 64, 32, generator=torch.Generator().manual_seed(1))


def count_macs(keep_ratio):
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        net = APFormer(in_channels=3, num_classes=2, keep_ratio=keep_ratio).eval()
        net(torch.empty(1, 3, 256, 256))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    return counter.get_total_flops() / 2, products / 2


def let_pass(layer, num_queries, tokens):
    """Shift the layer's classifier so that as many queries of the first image are relevant."""
    with torch.no_grad():
        odds = layer.classifier(tokens)[0].diff(dim=-1)[:, 0].sort(descending=True).values
        least = (odds[num_queries - 1] + odds[num_queries]) / 2
        layer.classifier.bias[1] += math.log(0.1 / 0.9) - least


def test_parameters_are_those_of_the_published_code_to_a_thousandth():
    with torch.device("meta"):
        net = APFormer(in_channels=3, num_classes=2)
    count = sum(parameter.numel() for parameter in net.parameters())
    assert count == 2_639_106
    assert count == pytest.approx(2.640e6, rel=0.001)


def test_multiply_adds_at_256_pixels_are_those_of_the_published_code():
    total, products = count_macs(1.0)
    assert total == pytest.approx(10.71e9, rel=0.01)
    assert products == pytest.approx(6.47e9, rel=0.01)
    assert products == 4 * 2 * 6 * 1024**2 * 128


@pytest.mark.parametrize("keep_ratio", [0.5, 0.25])
def test_multiply_adds_fall_with_the_queries_that_are_left_out(keep_ratio):
    spared = (1 - keep_ratio) * 1024
    of_each = 2 * 768 * 1024 + 768 + 2 * 768 * 128
    saved = count_macs(1.0)[0] - count_macs(keep_ratio)[0]
    assert saved == 4 * spared * of_each
    assert saved > 3e9


def test_keep_ratio_of_one_is_the_dense_form_exactly():
    images = make_images()
    assert torch.equal(build_small(keep_ratio=1.0)(images), build_small()(images))
    assert not torch.equal(build_small(keep_ratio=0.9)(images), build_small()(images))


def test_all_queries_gathered_give_the_dense_form():
    images, net = make_images(), build_small()
    with torch.no_grad():
        expected = net(images)
        for layer in net.layers:
            layer.num_queries = 32
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


def test_gathered_queries_give_the_dense_form_where_all_relevant_ones_are_among_them():
    torch.manual_seed(0)
    layer = build_layer().eval()
    tokens = torch.randn(1, 24, 8)
    let_pass(layer, 7, tokens)
    with torch.no_grad():
        expected = layer(tokens)
        attended = layer.classifier(tokens).softmax(-1)[..., 0] < 0.9
        assert attended.sum() == 7
        layer.num_queries = 7
        torch.testing.assert_close(layer(tokens), expected)
        layer.num_queries = 15
        torch.testing.assert_close(layer(tokens), expected)
        layer.num_queries = 6
        assert (layer(tokens) - expected).abs().amax(-1).gt(1e-6).sum() == 1


def test_irrelevant_queries_keep_their_value_and_go_through_the_mlp_alone():
    torch.manual_seed(0)
    layer, tokens = build_layer().eval(), torch.randn(1, 24, 8)
    let_pass(layer, 7, tokens)
    with torch.no_grad():
        odds = layer.classifier(tokens).diff(dim=-1)[0, :, 0]
        without = tokens + layer.mlp(layer.norm2(tokens))
        changed = (layer(tokens) - without).abs().amax(-1)[0] > 1e-6
    assert set(changed.nonzero()[:, 0].tolist()) == set(odds.topk(7).indices.tolist())


def test_fewest_queries_are_one():
    net = build_small(keep_ratio=0.001)
    assert [layer.num_queries for layer in net.layers] == [1, 1]
    assert net(make_images()).isfinite().all()


def test_attention_is_that_of_one_query_after_the_other():
    torch.manual_seed(0)
    attention, tokens = PrunedAttention(8, (2, 3), 2, 4), torch.randn(2, 6, 8)
    with torch.no_grad():
        attention.gate.fill_(1.0)
        attention.to_queries.weight.mul_(4)
    dropped = 0
    queries = attention.to_queries(tokens)
    keys, values = attention.to_keys_values(tokens).split(8, dim=-1)
    mixed = torch.zeros(2, 6, 8)
    for image, head, place in torch.cartesian_prod(*map(torch.arange, (2, 2, 6))).tolist():
        own = slice(4 * head, 4 * head + 4)
        query = queries[image, place, own]
        bias = attention.position()[place, head]
        weights = (keys[image, :, own] @ query / 2 + bias).softmax(0)
        share = attention.threshold(query).sigmoid() * attention.gate.sigmoid()
        limit = weights.min() + share * (weights.max() - weights.min())
        weights = torch.where(weights > limit, weights, 0.0)
        dropped += (weights == 0).sum()
        mixed[image, place, own] = weights / weights.sum() @ values[image, :, own]
    torch.testing.assert_close(attention.eval()(tokens, tokens), attention.out(mixed))
    assert 20 < dropped < 120


def test_keys_that_all_weigh_the_same_are_kept():
    torch.manual_seed(0)
    attention = PrunedAttention(8, (2, 3), 2, 4).eval()
    with torch.no_grad():
        attention.to_queries.weight.zero_()
        attention.position.table.zero_()
        attention.position.gaussian_widths.zero_()
        attention.position.squares.fill_(1)
        tokens = torch.randn(1, 6, 8)
        means = attention.to_keys_values(tokens)[..., 8:].mean(1, keepdim=True)
        expected = attention.out(means).expand(1, 6, 8)
        torch.testing.assert_close(attention(tokens, tokens), expected)


def test_position_bias_is_table_and_gaussian_of_every_pair():
    torch.manual_seed(0)
    position = GaussianPosition((2, 4), 3)
    biases = position()
    assert biases.shape == (8, 3, 8)
    for query, key in torch.cartesian_prod(torch.arange(8), torch.arange(8)).tolist():
        down, right = query // 4 - key // 4, query % 4 - key % 4
        square = (down**2 + right**2) / 16
        gauss = [math.exp(-square / (2 * (0.1 * head) ** 2)) for head in (1, 2, 3)]
        expected = position.table[(down + 1) * 7 + right + 3] + 0.01 * torch.tensor(gauss)
        torch.testing.assert_close(biases[query, :, key], expected, rtol=1e-3, atol=1e-6)


def test_logits_are_those_of_a_u_net_around_the_layers():
    net, images = build_small(), make_images()
    with torch.no_grad():
        finest = net.encoders[0](images)
        fine = net.encoders[1](F.max_pool2d(finest, 2))
        coarse = net.encoders[2](F.max_pool2d(fine, 2))
        tokens = net.encoders[3](F.max_pool2d(coarse, 2)).reshape(3, 12, 32).transpose(1, 2)
        for layer in net.layers:
            tokens = layer(tokens)
        features = tokens.transpose(1, 2).reshape(3, 12, 8, 4)
        upsample = nn.UpsamplingBilinear2d(scale_factor=2)
        features = net.decoders[0](torch.cat([coarse, upsample(features)], 1))
        features = net.decoders[1](torch.cat([fine, upsample(features)], 1))
        features = net.decoders[2](torch.cat([finest, upsample(features)], 1))
        torch.testing.assert_close(net(images), net.head(features))


def test_logits_depend_on_the_attention(monkeypatch):
    net, images = build_small(), make_images()
    with torch.no_grad():
        logits = net(images)
        monkeypatch.setattr(PrunedAttention, "forward", lambda self, queries, *_: queries)
        difference = net(images) - logits
    assert difference.abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
def test_masks_train_what_they_are_made_of(keep_ratio):
    net = build_small(keep_ratio=keep_ratio).train()
    net(make_images()).square().sum().backward()
    for layer in net.layers:
        makers = (layer.classifier.weight, layer.attention.gate, layer.attention.threshold.weight)
        assert all(maker.grad.abs().sum() > 0 for maker in makers)


def test_masks_are_hard_while_training():
    torch.manual_seed(0)
    layer, tokens = build_layer(), torch.randn(1, 24, 8)
    let_pass(layer, 7, tokens)
    torch.testing.assert_close(layer.train()(tokens), layer.eval()(tokens))


def test_keep_ratio_outside_its_range_is_refused():
    for wrong in (0, 1.5):
        with pytest.raises(ConfigError, match=rf"model\.keep_ratio: {wrong} is not in \(0, 1\]"):
            APFormer(in_channels=1, num_classes=2, keep_ratio=wrong)


def test_size_that_cannot_be_halved_is_refused_with_one_that_can():
    message = "model=apformer needs sides divisible by 8, got 60x64; set dataset.image_size=64"
    with pytest.raises(ShapeError, match=message):
        APFormer(in_channels=1, num_classes=2, image_size=(60, 64))


def test_another_size_than_the_networks_is_refused():
    with pytest.raises(ShapeError, match="model=apformer was built for 64x32 images, got 64x64"):
        build_small()(torch.zeros(1, 2, 64, 64))


def test_volumes_are_refused():
    with pytest.raises(ShapeError, match=r"model=apformer takes 2D images"):
        APFormer(in_channels=1, num_classes=2, image_size=(32, 32, 32))
