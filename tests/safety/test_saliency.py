import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from toy_predictions import make_spec

from medlite.errors import ConfigError
from medlite.safety.agreement import (
    compare_maps,
    inside_share,
    map_correlation,
    mean_correlation,
    top_overlap,
)
from medlite.safety.saliency import (
    METHODS,
    check_explainability,
    grad_cam,
    integrated_gradients,
    methods_of,
    occlusion,
    rolled_out,
    rollout,
    score_weights,
    scored,
)
from medlite.safety.saliency_graph import as_graph, attention_maps, redrawn
from medlite.safety_settings import ExplainabilitySettings

SHAPE = (1, 16, 16)


class Small(nn.Module):
    """Two convolutions, the second on a smaller map, pooling and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        maps = self.last(self.first(images).relu())
        return self.head(maps.relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))


def one_hot(position, count=3):
    return F.one_hot(torch.tensor(position), count).float()


def test_integrated_gradients_of_a_linear_model_are_weight_times_input(image):
    weight = torch.randn(SHAPE)
    found = integrated_gradients(lambda images: (images * weight).flatten(1).sum(1), image)
    np.testing.assert_allclose(found, (weight * image[0]).abs()[0].numpy(), rtol=1e-4)


def test_integrated_gradients_sum_to_the_change_of_the_score(net):
    bright = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(2))

    def score(images):
        return images.square().flatten(1).sum(1)  # each pixel's share has the sign of the whole

    found = integrated_gradients(score, bright)
    assert found.sum() == pytest.approx(float(score(bright)), rel=1e-3)


def test_grad_cam_weighs_the_deepest_map_by_its_mean_gradient(net, image):
    maps = net.last(net.first(image).relu()).relu().detach().requires_grad_()
    net.head(maps.mean((2, 3)))[0, 1].backward()
    shares = maps.grad.mean((2, 3), keepdim=True)
    coarse = (shares * maps.detach()).sum(1, keepdim=True).relu()
    expected = F.interpolate(coarse, (16, 16), mode="bilinear", align_corners=False)[0, 0]
    found = grad_cam(as_graph(net, SHAPE), one_hot(1), image)
    assert found.max() > 0
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_occlusion_lights_the_corner_that_a_model_reads(image):
    found = occlusion(lambda images: images[:, 0, :2, :2].sum((1, 2)), image.abs() + 1)
    assert (found > 0).sum() <= 4
    assert found[:2, :2].min() >= 0
    assert found[2:].max() == found[:, 2:].max() == 0


def test_occlusion_is_the_fall_of_the_score_without_a_window():
    image = torch.zeros(1, 1, 16, 16)
    image[0, 0, 4:6, 8:10] = 5
    found = occlusion(lambda images: images.flatten(1).sum(1), image)
    mean = 20 / 256
    assert found[4:6, 8:10] == pytest.approx(20 - 4 * mean)
    assert np.count_nonzero(found) == 4  # elsewhere the mean is more than nothing


def test_volumes_are_explained_too():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, 2, 3, 2, 1), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
    ).eval()  # fmt: skip
    volume = torch.randn(1, 1, 8, 8, 8)
    graph = as_graph(net, (1, 8, 8, 8))
    score = scored(graph, one_hot(0, 2))
    for found in (
        occlusion(score, volume), integrated_gradients(score, volume),
        grad_cam(graph, one_hot(0, 2), volume),
    ):  # fmt: skip
        assert found.shape == (8, 8, 8)
        assert found.max() > 0
    assert rollout(graph, volume) is None


def test_a_rollout_multiplies_attentions_with_residuals():
    first = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    second = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    by_hand = np.array([[0.6, 0.4], [0.5, 0.5]]) @ np.array([[0.75, 0.25], [0.0, 1.0]])
    np.testing.assert_allclose(rolled_out([first, second]).numpy(), by_hand, rtol=1e-6)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, in_chans=1, num_classes=3, depth=2
    ).eval()
    for block in net.blocks:
        block.attn.qkv.weight.data *= 20  # attention that is not all alike
    return net


def test_attention_is_that_of_the_unfused_network(transformer):
    image = torch.randn(1, 1, 32, 32)
    seen = []
    for block in transformer.blocks:
        block.attn.fused_attn = False
    handles = [
        block.attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for block in transformer.blocks
    ]
    with torch.no_grad():
        transformer(image)
    for handle in handles:
        handle.remove()
    for is_fused in (True, False):
        for block in transformer.blocks:
            block.attn.fused_attn = is_fused
        maps = attention_maps(as_graph(transformer, (1, 32, 32)), image)
        assert len(maps) == 2
        for found, expected in zip(maps, seen, strict=True):
            torch.testing.assert_close(found, expected[0].mean(0), atol=1e-5, rtol=1e-4)


def test_a_transformer_has_a_rollout_and_no_grad_cam(transformer):
    image = torch.randn(1, 1, 32, 32)
    graph = as_graph(transformer, (1, 32, 32))
    found = rollout(graph, image)
    assert found.shape == (32, 32)
    flow = rolled_out(attention_maps(graph, image))
    assert np.unravel_index(found.argmax(), found.shape)[0] // 8 == int(flow[0, 1:].argmax()) // 4
    assert grad_cam(graph, one_hot(0), image) is None


def test_a_convolutional_network_has_no_rollout(net, image):
    assert rollout(as_graph(net, SHAPE), image) is None


def test_a_redrawn_network_has_the_same_values_elsewhere(net, image):
    graph = as_graph(net, SHAPE)
    drawn = redrawn(graph, seed=0)
    for before, after in zip(graph.parameters(), drawn.parameters(), strict=True):
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
    assert not torch.allclose(graph(image), drawn(image))


def test_the_check_tells_an_edge_detector_from_an_explanation(net, image):
    images = [torch.randn(1, *SHAPE) for _ in range(4)]
    graph = as_graph(net, SHAPE)
    drawn = redrawn(graph, seed=3)

    def edges(_, each):
        return each[0, 0].diff(dim=1).abs().numpy()

    def explained(model, each):
        return grad_cam(model, one_hot(0), each)

    correlations = {
        method.__name__: mean_correlation(
            [method(graph, each) for each in images], [method(drawn, each) for each in images]
        )
        for method in (edges, explained)
    }
    assert correlations["edges"] == pytest.approx(1)
    assert correlations["explained"] < 0.9


def compare(before, after, **changes):
    usual = {
        "regions": [None] * len(after), "method": "occlusion", "where": "torch",
        "groups": [f"p{i}" for i in range(len(after))], "randomised_correlation": 0.1,
        "num_resamples": 500,
    }  # fmt: skip
    return compare_maps(before, after, **{**usual, **changes})


def maps(seed, count=6):
    return list(np.random.default_rng(seed).random((count, 10, 10)))


def test_equal_maps_agree_wholly():
    row = compare(maps(0), maps(0))
    assert row.rank_correlation == pytest.approx(1)
    assert row.top_overlap == 1
    assert row.rank_correlation_interval == pytest.approx((1, 1))
    assert row.note == ""


def test_the_overlap_of_the_most_salient_pixels():
    first, second = np.zeros((10, 10)), np.zeros((10, 10))
    first[0, :5] = 1
    second[0, 3:8] = 1
    assert top_overlap(first, second) == 2 / 8


def test_a_map_upside_down_has_the_other_order():
    [only] = maps(0, count=1)
    assert map_correlation(only, -only) == pytest.approx(-1)
    assert mean_correlation([only], [-only]) == pytest.approx(1)


def test_maps_that_show_nothing_do_not_count_as_agreement():
    flat, shaped = np.zeros((4, 8)), np.arange(32.0).reshape(4, 8)
    for measure in (map_correlation, top_overlap):
        assert np.isnan(measure(flat, flat))
        assert measure(flat, shaped) == 0
    assert mean_correlation([flat, shaped], [flat, shaped]) == pytest.approx(1)
    assert np.isnan(mean_correlation([flat], [flat]))


def test_the_share_inside_a_finding():
    region = np.zeros((10, 10), bool)
    region[:5] = True
    assert inside_share(np.ones((10, 10)), region) == pytest.approx(0.5)
    assert np.isnan(inside_share(np.zeros((10, 10)), region))
    assert np.isnan(inside_share(np.ones((10, 10)), None))
    row = compare([np.ones((10, 10))] * 4, [region.astype(float)] * 4, regions=[region] * 4)
    assert (row.inside_before, row.inside_after, row.inside_change) == pytest.approx((0.5, 1, 0.5))


def test_without_an_uncompressed_model_only_the_inside_is_told():
    region = np.ones((10, 10), bool)
    row = compare(None, maps(0), regions=[region] * 6)
    assert (row.rank_correlation, row.inside_change) == (None, None)
    assert row.inside_after == pytest.approx(1)


def test_a_method_that_shows_the_image_is_told():
    row = compare(maps(0), maps(1), randomised_correlation=0.8)
    assert row.note == "shows the image rather than the model: decides nothing"


@pytest.mark.parametrize(
    ("labels", "logits", "expected"),
    [
        ("multiclass", [0.1, 2.0, -1.0], [0, 1, 0]),
        ("multilabel", [-0.1, -2.0, -1.0], [1, 0, 0]),
        ("binary", [-0.5], [-1]),
        ("binary", [0.5], [1]),
    ],
)
def test_the_decided_class_is_explained(labels, logits, expected):
    counts = (1, 1) if labels == "binary" else (1, 1, 1)
    spec = make_spec(labels=labels, class_counts=counts)
    assert score_weights(torch.tensor(logits), np.array(0), spec).tolist() == expected


def test_of_a_mask_the_decided_foreground_is_explained_or_else_the_true_one():
    spec = make_spec(task="segmentation", class_counts=(9, 1, 1))
    logits = torch.zeros(3, 2, 2)
    logits[0] = 1
    logits[2, 0, 0] = 5
    target = np.array([[0, 1], [0, 0]])
    expected = torch.zeros(3, 2, 2)
    expected[2, 0, 0] = 1
    assert torch.equal(score_weights(logits, target, spec), expected)
    logits[2, 0, 0] = 0
    expected = torch.zeros(3, 2, 2)
    expected[1, 0, 1] = 1
    assert torch.equal(score_weights(logits, target, spec), expected)


def test_methods_are_checked():
    with pytest.raises(ConfigError, match=r"methods: 'gradcam', did you mean 'grad_cam'"):
        check_explainability(ExplainabilitySettings(methods=["gradcam"]))
    with pytest.raises(ConfigError, match="neither auto nor a list"):
        check_explainability(ExplainabilitySettings(methods="occlusion"))
    with pytest.raises(ConfigError, match=r"explainability.enabled=false"):
        check_explainability(ExplainabilitySettings(methods=[]))
    check_explainability(ExplainabilitySettings())
    assert methods_of(ExplainabilitySettings()) == METHODS
