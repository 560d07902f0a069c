import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import AttentionUnet, BasicUNet, UNet
from torch import nn
from toy_world import TinyClassifier, TinyUNet, make_batch, make_context, make_spec, train

from medlite.compression.pruning import StructuredPruning
from medlite.errors import ConfigError, MedliteError
from medlite.models.lightm_unet import LightMUNet
from medlite.models.timm_classifier import TimmClassifier

STEP = StructuredPruning(epochs=1, learning_rate=1e-3, importance="magnitude", round_to=4)

MODELS = {
    "tiny_unet": (TinyUNet, (32, 32)),
    "basic_unet_3d": (
        lambda: BasicUNet(spatial_dims=3, in_channels=1, out_channels=1, features=(8,) * 6),
        (32, 16, 16),
    ),
    "unet_with_prelu": (
        lambda: UNet(
            spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16, 32), strides=(2, 2),
            num_res_units=1,
        ),
        (32, 32),
    ),
    "attention_unet": (
        lambda: AttentionUnet(
            spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16, 32), strides=(2, 2)
        ),
        (32, 32),
    ),
}  # fmt: skip

CLASSIFIERS = [
    "resnet18",
    pytest.param("mobilenetv3_small_100", marks=pytest.mark.slow),
    pytest.param("mobilevit_xs", marks=pytest.mark.slow),
    pytest.param("efficientformerv2_s0", marks=pytest.mark.slow),
]


def num_parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def saved_and_loaded(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_step(step, build, spec):
    """Same shape of output, fewer parameters and multiply-adds, an exact way back."""
    torch.manual_seed(0)
    net = build()
    context = make_context(spec, steps=1)
    pruned, state = step.apply(net, context)
    image = make_batch(spec, 2).image
    assert pruned.eval()(image).shape == net.eval()(image).shape
    assert num_parameters(pruned) < num_parameters(net)
    assert context.fit.calls == [{"name": "prune", "epochs": 1, "learning_rate": 1e-3}]

    state, weights = saved_and_loaded((state, pruned.state_dict()))
    restored = step.restore(build(), state, spec)
    restored.load_state_dict(weights, strict=True)
    assert (restored.eval()(image) - pruned(image)).abs().max().item() == 0.0
    return pruned, context


@pytest.mark.parametrize("name", MODELS)
def test_pruned_segmentation_net_is_smaller_and_restores_exactly(name):
    build, image_size = MODELS[name]
    check_step(STEP, build, make_spec(image_size=image_size))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_pruned_classifier_is_smaller_and_restores_exactly(name):
    spec = make_spec("classification", "multiclass", num_classes=3)
    options = {"in_channels": 1, "num_classes": 3, "image_size": spec.image_size}
    check_step(STEP, lambda: TimmClassifier(name=name, **options), spec)


@pytest.mark.slow
def test_taylor_importance_prunes_a_state_space_model():
    spec = make_spec(image_size=(8, 8))
    step = replace(STEP, importance="taylor", importance_batches=2)
    options = {"init_filters": 16, "blocks_down": (1, 1)}
    check_step(step, lambda: LightMUNet(in_channels=1, num_classes=1, **options), spec)


@pytest.mark.slow
def test_pruned_branches_still_merge(classes):
    pruned, _ = check_step(
        STEP, lambda: TimmClassifier(in_channels=1, num_classes=3, name="mobileone_s0"), classes
    )
    image = make_batch(classes, 2).image
    logits = pruned(image)
    assert (pruned.deploy()(image) - logits).abs().max() < 1e-5 * logits.abs().max()


def test_half_of_every_group_goes():
    net = TinyUNet(width=16).eval()
    pruned, _ = STEP.apply(net, make_context(make_spec()))
    widths = [m.out_channels for m in pruned.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [8, 16, 8, 8, 1]


def test_channels_without_weight_are_the_ones_that_go(spec):
    net = TinyUNet(dropout=0.0).eval()
    with torch.no_grad():
        for block in (net.stem, net.down[1], net.merge, net.refine):
            dead = slice(None, None, 2)
            block[0].weight[dead] = 0.0
            block[1].weight[dead] = 0.0
            block[1].bias[dead] = 0.0
    context = make_context(spec)
    context.fit = lambda net, **_: net
    pruned, _ = STEP.apply(net, context)
    image = make_batch(spec, 4).image
    assert num_parameters(pruned) < 0.3 * num_parameters(net)
    assert torch.allclose(pruned(image), net(image), atol=1e-5)


def test_the_net_that_was_given_stays_as_it_was(trained_unet, spec):
    before = {name: tensor.clone() for name, tensor in trained_unet.state_dict().items()}
    replace(STEP, importance="taylor").apply(trained_unet, make_context(spec))
    after = trained_unet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_attention_layers_cache_does_not_stop_pruning(classes):
    class Caching(TinyClassifier):
        """As timm's attention biases: computed once in evaluation mode, dropped in training."""

        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))
            self.cache = {}

        def train(self, mode=True):
            if mode:
                self.cache = {}
            return super().train(mode)

        def forward(self, image):
            if self.training:
                return super().forward(image) + 2 * self.bias
            self.cache.setdefault("bias", 2 * self.bias)
            return super().forward(image) + self.cache["bias"]

    net = Caching().eval()
    net(make_batch(classes, 2).image)
    pruned, _ = replace(STEP, importance="taylor").apply(net, make_context(classes))
    assert num_parameters(pruned) < num_parameters(net)
    assert not net.training


def test_fine_tuning_starts_from_the_pruned_net_and_learns(trained_unet, spec):
    step = replace(STEP, importance="taylor", epochs=6, learning_rate=1e-2)
    pruned, _ = step.apply(trained_unet, make_context(spec))
    batch = make_batch(spec, 32, seed=60)
    is_inside = pruned(batch.image)[:, 0] > 0
    assert (is_inside == (batch.target > 0)).float().mean() > 0.97


def test_group_normalisation_keeps_equal_parts():
    net = nn.Sequential(
        nn.Conv2d(1, 24, 3), nn.GroupNorm(3, 24), nn.ReLU(), nn.Conv2d(24, 1, 1)
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[0].weight[:8] *= 0.01  # all unimportant channels are in one part
        net[1].weight[:8] *= 0.01
    spec = make_spec()
    context = make_context(spec)
    context.fit = lambda net, **_: net
    pruned, _ = replace(STEP, round_to=1).apply(net, context)
    assert pruned[0].out_channels == 12
    assert pruned[1].num_channels == 12
    assert pruned(torch.zeros(1, 1, 8, 8)).shape == (1, 1, 6, 6)


def test_attention_keeps_its_size_and_what_feeds_it(classes):
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 16, 4, stride=4)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
            self.head = nn.Linear(16, 3)

        def forward(self, image):
            tokens = self.stem(image).flatten(2).transpose(1, 2)
            tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
            return self.head((tokens + self.mlp(tokens)).mean(1))

    pruned, _ = STEP.apply(Attentive(), make_context(classes))
    assert pruned.stem.out_channels == 16
    assert pruned.attention.embed_dim == 16
    assert pruned.mlp[0].out_features == 16


def test_a_gate_of_one_channel_does_not_stop_pruning(spec):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 16, 3, padding=1)
            self.inner = nn.Conv2d(16, 16, 3, padding=1)
            self.gate = nn.Conv2d(2, 1, 7, padding=3)
            self.last = nn.Conv2d(16, 1, 1)

        def forward(self, image):
            features = self.inner(F.relu(self.first(image)))
            summary = torch.cat([features.mean(1, True), features.amax(1, True)], 1)
            return self.last(features * self.gate(summary).sigmoid())

    pruned, _ = STEP.apply(Gated(), make_context(spec))
    assert (pruned.first.out_channels, pruned.inner.out_channels) == (8, 8)


def test_the_card_says_what_went(trained_unet, spec):
    context = make_context(spec)
    pruned, _ = STEP.apply(trained_unet, context)
    text = context.report.lines["pruning"]
    assert f"from {num_parameters(trained_unet):,} parameters" in text
    assert f"to {num_parameters(pruned):,} parameters" in text
    assert "3 of 3 groups of channels" in text


def test_a_net_too_narrow_to_prune_is_refused(classes):
    net = train(TinyClassifier(width=4), classes, epochs=1)
    with pytest.raises(MedliteError, match=r"nothing could be pruned in TinyClassifier at ratio"):
        replace(STEP, round_to=64).apply(net, make_context(classes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.3}, r"ratio: 1.3 is not in \(0, 1\)"),
        ({"importance": "luck"}, "importance: 'luck' is not one of magnitude, taylor, bn_scale"),
        ({"round_to": 0}, "round_to: 0 is not a whole number from 1 up"),
        ({"importance_batches": 0}, "importance_batches: 0 is not a whole number"),
        ({"epochs": 0, "ratio": 0.0}, r"has 2 errors"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        StructuredPruning(**({"epochs": 1, "learning_rate": 1e-3} | options))
