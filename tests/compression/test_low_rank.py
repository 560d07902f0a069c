import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy_world import TinyClassifier, TinyUNet, make_batch, make_context, make_spec

from medlite.compression.low_rank import LowRank
from medlite.compression.pruning import StructuredPruning
from medlite.compression.quantization import PostTrainingQuantization
from medlite.errors import ConfigError, MedliteError

STEP = LowRank(epochs=1, learning_rate=1e-3)

CHEAPEST = {"rank_rule": "energy", "least_energy": 0.01}
"""every layer that can be cut is cut, also one that costs little"""

SEGMENTATION = {
    "tiny_unet": (lambda: TinyUNet(width=32), (32, 32)),
    "unet_3d": (
        lambda: UNet(
            spatial_dims=3, in_channels=1, out_channels=1, channels=(16, 24, 32), strides=(2, 2),
            num_res_units=1,
        ),
        (8, 8, 8),
    ),
}  # fmt: skip


def num_macs(net, image):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(image)
    return counter.get_total_flops() // 2


def saved_and_loaded(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def without_training(spec):
    context = make_context(spec)
    context.fit = lambda net, **_: net
    return context


def factorise(net, spec, **options):
    """The net, its state and the report, without training."""
    context = without_training(spec)
    thin, state = replace(STEP, **options).apply(net.eval(), context)
    return thin, state["ranks"], context.report.lines


def check_step(step, build, spec):
    """Same shape of output, fewer multiply-adds, an exact way back."""
    torch.manual_seed(0)
    net = build()
    context = make_context(spec, steps=1)
    thin, state = step.apply(net, context)
    image = make_batch(spec, 2).image
    assert thin.eval()(image).shape == net.eval()(image).shape
    assert num_macs(thin, image) < num_macs(net, image)
    assert context.fit.calls == [{"name": "low_rank", "epochs": 1, "learning_rate": 1e-3}]

    state, weights = saved_and_loaded((state, thin.state_dict()))
    restored = step.restore(build(), state, spec)
    restored.load_state_dict(weights, strict=True)
    assert (restored.eval()(image) - thin(image)).abs().max().item() == 0.0
    return thin, state["ranks"], context


@pytest.mark.parametrize("name", SEGMENTATION)
def test_a_segmentation_net_gets_cheaper_and_restores_exactly(name):
    build, image_size = SEGMENTATION[name]
    check_step(STEP, build, make_spec(image_size=image_size))


def test_a_classifier_gets_cheaper_and_restores_exactly(classes):
    check_step(STEP, lambda: TinyClassifier(width=32), classes)


class Mixed(nn.Module):
    """Every kind of layer once, between a stem and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 48, 3, stride=2, padding=1)
        self.kernel = nn.Conv2d(48, 48, 3, padding=1, padding_mode="circular")
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.pointwise = nn.Conv2d(48, 48, 1)
        self.up = nn.ConvTranspose2d(48, 48, 2, stride=2)
        self.narrow = nn.Conv2d(48, 8, 1)
        self.wide = nn.Conv2d(8, 48, 1)
        self.linear = nn.Linear(48, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, image):
        features = F.relu(self.kernel(F.relu(self.stem(image))))
        features = self.up(F.relu(self.pointwise(self.depthwise(features))))
        features = self.wide(F.relu(self.narrow(features)))
        return self.head(F.relu(self.linear(features.flatten(2).mean(2))))


def test_every_kind_of_layer_is_cut_or_named(classes):
    thin, ranks, lines = factorise(Mixed(), classes, **CHEAPEST)
    assert ranks == {"kernel": [8, 8], "pointwise": [8], "linear": [8]}
    assert [type(part) for part in thin.kernel] == [nn.Conv2d] * 3
    left = lines["not factorised"]
    for reason in (
        "first: stem",
        "last: head",
        "grouped: depthwise",
        "a ConvTranspose2d: up",
        "no rank saves multiply-adds: narrow, wide",
    ):
        assert reason in left


def test_the_budget_is_kept_as_torch_counts(classes):
    net, image = Mixed().eval(), torch.zeros(1, 1, 32, 32)
    thin, _, lines = factorise(net, classes, macs_ratio=0.4)
    cuttable = 256 * 48 * 48 * 9 + 256 * 48 * 48 + 48 * 64
    saved = num_macs(net, image) - num_macs(thin, image)
    assert 0.6 * cuttable <= saved < 0.75 * cuttable
    assert f"({(cuttable - saved) / cuttable:.2f})" in lines["low rank"]


def test_a_smaller_budget_costs_less(classes):
    image = torch.zeros(1, 1, 32, 32)
    nets = [factorise(Mixed(), classes, macs_ratio=ratio)[0] for ratio in (0.7, 0.5, 0.3)]
    costs = [num_macs(net, image) for net in nets]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 3


def test_weights_of_low_rank_lose_nothing(classes):
    net = Mixed()
    with torch.no_grad():
        for layer in (net.kernel, net.pointwise, net.linear):
            left, right = torch.randn(len(layer.weight), 5), torch.randn(5, layer.weight.shape[1])
            kernel = torch.randn(layer.weight[0, 0].shape)
            layer.weight.copy_(0.05 * torch.tensordot(left @ right, kernel, dims=0))
    thin, ranks, _ = factorise(net, classes, rank_rule="energy", least_energy=0.999)
    assert ranks == {"kernel": [8, 8], "pointwise": [8], "linear": [8]}
    image = make_batch(classes, 4).image
    assert torch.allclose(thin(image), net(image), atol=1e-5)


def test_energy_bounds_the_budget(classes):
    net = Mixed()
    thin, _, lines = factorise(net, classes, macs_ratio=0.1, least_energy=0.6)
    assert "which ranks from 8 up and least_energy put out of reach" in lines["low rank"]
    first, core, last = (part.weight.detach().double() for part in thin.kernel)
    weight = torch.einsum("nr,rihw,im->nmhw", last[..., 0, 0], core, first[..., 0, 0])
    lost = (net.kernel.weight.double() - weight).square().sum()
    assert 0.3 < lost / net.kernel.weight.square().sum() <= 0.4


def test_variational_bayes_keeps_the_components_that_were_planted(classes):
    net = Mixed()
    with torch.no_grad():
        for layer, rank in ((net.pointwise, 14), (net.kernel, 3)):
            left, right = torch.randn(len(layer.weight), rank), torch.randn(rank, 48)
            kernel = torch.ones(layer.weight[0, 0].shape)
            layer.weight.copy_(torch.tensordot(left @ right, kernel, dims=0))
            layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    _, ranks, _ = factorise(net, classes, rank_rule="vbmf")
    assert ranks["pointwise"] == [16]
    assert ranks["kernel"] == [8, 8]
    _, ranks, _ = factorise(net, classes, rank_rule="vbmf", round_to=1)
    assert ranks["pointwise"] == [14]


def test_first_and_last_layers_go_too_when_asked(classes):
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(32, 64)
            self.last = nn.Linear(64, 32)

        def forward(self, image):
            return self.last(F.relu(self.first(image))).mean((1, 2))

    with pytest.raises(MedliteError, match=r"nothing could be factorised in Ends: .*first: first"):
        factorise(Ends(), classes)
    _, ranks, _ = factorise(Ends(), classes, keep_first=False)
    assert list(ranks) == ["first"]
    _, ranks, _ = factorise(Ends(), classes, keep_first=False, keep_last=False)
    assert list(ranks) == ["first", "last"]


class Refined(TinyClassifier):
    """A classifier with something between features and head; `refine` says what."""

    def __init__(self):
        super().__init__(width=32)
        self.inner = nn.Linear(64, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, image):
        return self.head(self.refine(self.features(image).mean((2, 3))))

    def refine(self, features):
        return self.inner(features)


def test_a_layer_that_is_used_twice_is_cut_once_and_counts_twice(classes):
    class Twice(Refined):
        def refine(self, features):
            return self.inner(F.relu(self.inner(features)))

    _, ranks, context = check_step(replace(STEP, **CHEAPEST), Twice, classes)
    assert ranks["inner"] == [8]
    cuttable = 256 * 32 * 64 * 9 + 64 * 64 * 64 * 9 + 2 * 64 * 64
    assert f"from {cuttable / 1e6:,.1f} to" in context.report.lines["low rank"]


def test_a_layer_under_two_names_stays_one_layer(classes):
    class Shared(Refined):
        def __init__(self):
            super().__init__()
            self.again = nn.Sequential(nn.ReLU(), self.inner)

        def refine(self, features):
            return self.again(self.inner(features))

    thin, ranks, _ = check_step(replace(STEP, **CHEAPEST), Shared, classes)
    assert "inner" in ranks
    assert "again.1" not in ranks
    assert thin.again[1] is thin.inner


def test_layers_that_share_a_weight_stay(classes):
    class Tied(Refined):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(64, 64)
            self.other.weight = self.inner.weight

        def refine(self, features):
            return self.other(F.relu(self.inner(features)))

    _, ranks, lines = factorise(Tied(), classes, **CHEAPEST)
    assert not {"inner", "other"} & ranks.keys()
    assert "shares its weight: inner, other" in lines["not factorised"]


def read_weight(net, features):
    return F.linear(features, net.inner.weight, net.inner.bias)


def read_size(net, features):
    return net.inner(features) / net.inner.out_features


def read_in_training(net, features):
    return net.inner(features) + (net.inner.weight.mean() if net.training else 0.0)


@pytest.mark.parametrize(
    ("refine", "reason"),
    [
        (read_weight, "read by other code (bias, weight): inner"),
        (read_size, "read by other code (out_features): inner"),
        (read_in_training, "read by other code (weight): inner"),
        (lambda net, features: features, "not called: inner"),
    ],
)
def test_layers_that_other_code_reads_stay(classes, refine, reason):
    class Reading(Refined):
        def refine(self, features):
            return refine(self, features)

    thin, ranks, lines = factorise(Reading(), classes, **CHEAPEST, keep_first=False)
    assert "inner" not in ranks
    assert reason in lines["not factorised"]
    assert thin(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


def test_layers_that_deployment_reads_stay(classes):
    class Deployable(Refined):
        """As re-parameterisable blocks: the deployed form is made of the weights."""

        def deploy(self):
            merged = Refined()
            merged.features, merged.head = self.features, self.head
            merged.inner.weight, merged.inner.bias = self.inner.weight, self.inner.bias
            return merged

    thin, _, lines = factorise(Deployable(), classes, **CHEAPEST)
    assert "read by other code (bias, weight): inner" in lines["not factorised"]
    image = make_batch(classes, 2).image
    assert torch.allclose(thin.deploy().eval()(image), thin(image))


def test_attention_and_its_fast_path_stay_whole(classes):
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 48, 4, stride=4)
            self.block = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
            self.mlp = nn.Linear(48, 48)
            self.head = nn.Linear(48, 3)

        def forward(self, image):
            tokens = self.block(self.stem(image).flatten(2).transpose(1, 2))
            return self.head(self.mlp(tokens).mean(1))

    thin, ranks, lines = factorise(Attentive(), classes)
    assert list(ranks) == ["mlp"]
    assert "a NonDynamicallyQuantizableLinear: block.self_attn.out_proj" in lines["not factorised"]
    assert thin(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


def test_hooked_and_parametrised_layers_stay(classes):
    class Hooked(Refined):
        def __init__(self):
            super().__init__()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
            self.inner.register_forward_hook(lambda *_: None)

        def refine(self, features):
            return self.normed(self.inner(features))

    _, ranks, lines = factorise(Hooked(), classes, **CHEAPEST)
    assert not {"inner", "normed"} & ranks.keys()
    assert "has hooks: inner" in lines["not factorised"]
    assert "a ParametrizedLinear: normed" in lines["not factorised"]


def test_a_net_that_looks_at_types_is_refused(classes):
    class Looking(Refined):
        def refine(self, features):
            return self.inner(features) if isinstance(self.inner, nn.Linear) else features

    with pytest.raises(MedliteError, match="Looking cannot be factorised: it computes something"):
        factorise(Looking(), classes)


def test_a_net_whose_deployment_looks_at_types_is_refused(classes):
    class Folding(Refined):
        def deploy(self):
            deployed = copy.deepcopy(self)
            if not isinstance(deployed.inner, nn.Linear):
                deployed.inner = nn.Identity()
            return deployed

    with pytest.raises(MedliteError, match="Folding cannot be factorised: it computes something"):
        factorise(Folding(), classes)


def test_a_pruned_net_can_be_factorised(classes):
    prune = StructuredPruning(epochs=1, learning_rate=1e-3, importance="magnitude", ratio=0.25)
    net = TinyClassifier(width=48)
    pruned, structure = prune.apply(net, make_context(classes, steps=1))
    thin, state = STEP.apply(pruned, make_context(classes, steps=1))
    again = prune.restore(TinyClassifier(width=48), structure, classes)
    restored = STEP.restore(again, state, classes)
    restored.load_state_dict(thin.state_dict(), strict=True)
    image = make_batch(classes, 2).image
    assert thin.features[2][0][0].in_channels < 48
    assert torch.equal(restored(image), thin(image))


def test_a_factorised_net_can_be_pruned(classes):
    prune = StructuredPruning(epochs=1, learning_rate=1e-3, importance="magnitude", ratio=0.25)
    thin, state = STEP.apply(TinyClassifier(width=48), make_context(classes, steps=1))
    pruned, structure = prune.apply(thin, make_context(classes, steps=1))
    inner = pruned.features[2][0]
    assert inner[2].out_channels < thin.features[2][0][2].out_channels
    again = prune.restore(
        STEP.restore(TinyClassifier(width=48), state, classes), structure, classes
    )
    again.load_state_dict(pruned.state_dict(), strict=True)
    image = make_batch(classes, 2).image
    assert torch.equal(again(image), pruned(image))


def test_the_layers_of_a_factorised_net_can_be_quantised(classes):
    thin, ranks, _ = factorise(TinyClassifier(width=32), classes)
    context = make_context(classes)
    PostTrainingQuantization(calibration_samples=8, method="minmax").apply(thin, context)
    num_layers = sum(len(some) + 1 for some in ranks.values())
    assert f"INT8 in {num_layers} of {num_layers + 2}" in context.report.lines["quantisation"]


def test_the_net_that_was_given_stays_as_it_was(spec):
    net = TinyUNet(width=32).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    STEP.apply(net, make_context(spec, steps=1))
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert net.training


def test_dropout_during_the_survey_leaves_the_random_numbers_alone(spec):
    torch.manual_seed(3)
    net = TinyUNet(width=32)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    factorise(net, spec)
    assert torch.equal(torch.rand(1), expected)


def test_training_mends_what_the_cut_broke(trained_unet, spec):
    step = replace(STEP, macs_ratio=0.4, epochs=3, learning_rate=1e-2)
    batch = make_batch(spec, 32, seed=60)
    cut, _, _ = factorise(trained_unet, spec, macs_ratio=0.4)
    trained, _ = step.apply(trained_unet, make_context(spec))
    accuracies = [
        ((some(batch.image)[:, 0] > 0) == (batch.target > 0)).float().mean().item()
        for some in (cut, trained)
    ]
    assert accuracies[0] < accuracies[1]
    assert accuracies[1] > 0.97


def test_a_net_too_narrow_is_refused(classes):
    message = (
        r"nothing could be factorised in TinyClassifier: of its convolutions and linear layers "
        r"first: features.0.0; last: head; no rank saves multiply-adds: features.2.0, features.4.0"
    )
    with pytest.raises(MedliteError, match=message):
        factorise(TinyClassifier(width=4), classes)


def test_fresh_weights_of_full_rank_do_not_refuse_the_training(classes):
    context = make_context(classes)
    context.is_dry = True
    step = LowRank(epochs=1, learning_rate=1e-3, rank_rule="energy", least_energy=0.999)
    whole = TinyClassifier(width=32)
    net, state = step.apply(whole, context)
    assert state == {"ranks": {}}
    assert net.state_dict().keys() == whole.state_dict().keys()
    assert "would lose too much" in context.report.lines["low rank"]


def test_too_much_energy_to_save_anything_is_refused(classes):
    with pytest.raises(MedliteError, match="would lose too much for what it saves"):
        factorise(TinyClassifier(width=32), classes, rank_rule="energy", least_energy=0.999)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs_ratio": 1.0}, r"macs_ratio: 1.0 is not in \(0, 1\)"),
        ({"least_energy": 1.0}, r"least_energy: 1.0 is not in \[0, 1\)"),
        ({"rank_rule": "luck"}, "rank_rule: 'luck' is not one of budget, energy, vbmf"),
        ({"rank_rule": "energy"}, "least_energy: 0.0 is not above 0, for rank_rule=energy"),
        ({"round_to": 0}, "round_to: 0 is not a whole number from 1 up"),
        ({"epochs": 0, "macs_ratio": 0.0}, "has 2 errors"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LowRank(**({"epochs": 1, "learning_rate": 1e-3} | options))
