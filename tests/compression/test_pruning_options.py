"""Criteria, scopes, turns, targets and protected layers of structured pruning."""

import copy
from dataclasses import replace

import onnxruntime
import pytest
import torch
from test_pruning import STEP, num_parameters, saved_and_loaded
from torch import nn
from toy_world import TinyClassifier, TinyUNet, make_batch, make_context

from medlite.compression.channel_importance import IMPORTANCES
from medlite.compression.pruning import StructuredPruning
from medlite.errors import ConfigError, MedliteError
from medlite.export.export import export

GLOBAL = replace(STEP, scope="global")


class FakeMeter:
    """Latency that is a constant and the number of parameters."""

    where = "abacus (desk)"

    def __init__(self, overhead_ms=0.0):
        self.overhead_ms = overhead_ms
        self.calls = []

    def __call__(self, net):
        self.calls.append(num_parameters(net))
        return self.overhead_ms + num_parameters(net) / 1e3


def keep_weights(context):
    context.fit = lambda net, **_: net.eval()
    return context


def widths(net):
    return [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]


def restored(step, build, state, pruned, spec):
    state, weights = saved_and_loaded((state, pruned.state_dict()))
    net = step.restore(build(), state, spec)
    net.load_state_dict(weights, strict=True)
    return net.eval()


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = TinyUNet(width=16).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.1, 2.0)
    return net


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_every_criterion_prunes_and_restores_exactly(net, spec, importance, scope):
    step = replace(STEP, importance=importance, scope=scope, importance_batches=2)
    pruned, state = step.apply(net, keep_weights(make_context(spec)))
    assert num_parameters(pruned) < num_parameters(net)
    image = make_batch(spec, 2).image
    again = restored(step, TinyUNet, state, pruned, spec)
    assert (again(image) - pruned(image)).abs().max().item() == 0.0


def test_frozen_parameters_are_pruned_and_stay_frozen(net, spec):
    net.stem.requires_grad_(False)
    pruned, _ = replace(STEP, importance="taylor").apply(net, keep_weights(make_context(spec)))
    assert num_parameters(pruned.stem) < num_parameters(net.stem)
    flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    assert flags == {name: part.requires_grad for name, part in pruned.named_parameters()}


def test_channels_of_the_smallest_scales_of_batch_normalisation_go(net, spec):
    step = replace(STEP, importance="bn_scale")
    pruned, _ = step.apply(net, keep_weights(make_context(spec)))
    scales = net.down[1][1].weight.abs()
    assert torch.equal(pruned.down[1][1].weight, net.down[1][1].weight[scales > scales.median()])


def test_groups_without_batch_normalisation_have_no_scale_and_stay(spec):
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 1, 1),
    ).eval()  # fmt: skip
    context = keep_weights(make_context(spec))
    pruned, _ = replace(STEP, importance="bn_scale").apply(net, context)
    assert widths(pruned) == [16, 8, 1]
    assert context.report.lines["not scored by bn_scale"].startswith("1 groups of channels")


@pytest.mark.parametrize("target", ["ratio", "macs"])
def test_where_no_channel_has_a_scale_the_reason_is_told(spec, target):
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1)).eval()
    step = replace(STEP, importance="bn_scale", target=target)
    with pytest.raises(MedliteError, match=r"by batch normalisation, .* importance=magnitude"):
        step.apply(net, make_context(spec))


def test_globally_groups_lose_unequal_shares_but_none_more_than_its_floor(net, spec):
    with torch.no_grad():
        net.down[1][0].weight[8:] *= 1e-3  # most of the widest group is unimportant
        net.down[1][1].weight[8:] *= 1e-3
        net.merge[0].weight[:, 24:] *= 1e-3
    pruned, _ = GLOBAL.apply(net, keep_weights(make_context(spec)))
    assert pruned.down[1][0].out_channels == 8
    assert sum(widths(pruned)) >= 0.5 * sum(widths(net))
    assert min(widths(pruned)[:-1]) > 8 / 2
    floored, _ = replace(GLOBAL, max_ratio=0.5).apply(net, keep_weights(make_context(spec)))
    assert floored.down[1][0].out_channels == 16


def test_turns_share_the_epochs_and_have_names_of_their_own(net, spec):
    step = replace(STEP, iterations=3, epochs=5, round_to=1)
    context = make_context(spec, steps=1)
    pruned, state = step.apply(net, context)
    assert [(c["name"], c["epochs"]) for c in context.fit.calls] == [
        ("prune_1", 1), ("prune_2", 2), ("prune_3", 2),
    ]  # fmt: skip
    sizes = [widths(each)[1] for each in context.fit.nets]
    assert sizes == [26, 21, 16]  # 32 by half in three equal shares, rounded up
    assert widths(pruned) == [8, 16, 8, 8, 1]
    image = make_batch(spec, 2).image
    again = restored(step, TinyUNet, state, pruned, spec)
    assert (again(image) - pruned(image)).abs().max().item() == 0.0
    assert context.report.lines["pruning in turns"].count("prune_") == 3


def test_turns_that_are_made_again_after_a_kill_give_the_same_nets(net, spec):
    step = replace(GLOBAL, importance="random", iterations=2, epochs=2, round_to=1)

    def trained_nets(noise_seed):
        nets = []

        def fit(net, **_):
            nets.append(copy.deepcopy(net))
            torch.manual_seed(noise_seed)  # as many random numbers as a fit needs
            return net.eval()

        context = make_context(spec)
        context.fit = fit
        torch.manual_seed(1)
        step.apply(net, context)
        return nets

    for first, second in zip(trained_nets(10), trained_nets(20), strict=True):
        tensors = second.state_dict()
        assert all(torch.equal(t, tensors[name]) for name, t in first.state_dict().items())


def count_convolution_macs(net, image):
    total = 0

    def add(layer, _, output):
        nonlocal total
        total += layer.weight[0].numel() * output.numel()

    copied = copy.deepcopy(net)
    for module in copied.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    copied(image)
    return total


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(("target", "ratio"), [("macs", 0.3), ("macs", 0.8), ("params", 0.6)])
def test_no_more_is_left_than_the_target_and_nearly_as_much(net, spec, scope, target, ratio):
    step = replace(STEP, target=target, ratio=ratio, scope=scope, round_to=1)
    context = keep_weights(make_context(spec))
    pruned, _ = step.apply(net, context)
    image = make_batch(spec, 1).image
    count = num_parameters if target == "params" else lambda n: count_convolution_macs(n, image)
    left = count(pruned) / count(net)
    assert 1 - ratio - 0.1 < left <= 1 - ratio
    assert f"at most {1 - ratio:.1%} of" in context.report.lines["target of prune"]
    assert f"{left:.1%} is left" in context.report.lines["target of prune"]


def test_a_target_that_no_channels_reach_is_refused_before_training(net, spec):
    step = replace(STEP, target="macs", ratio=0.9, max_ratio=0.5)
    context = make_context(spec)
    with pytest.raises(MedliteError, match=r"target=macs: no pruning leaves 10.0% of the multiply"):
        step.apply(net, context)
    assert not context.fit.calls


def test_latency_is_what_the_meter_says(net, spec):
    step = replace(STEP, target="latency", ratio=0.6, round_to=1)
    context = keep_weights(make_context(spec))
    context.latency_ms = FakeMeter()
    pruned, _ = step.apply(net, context)
    assert num_parameters(pruned) <= 0.4 * num_parameters(net)
    assert num_parameters(pruned) in context.latency_ms.calls
    assert context.latency_ms.calls[0] == num_parameters(net)
    assert len(context.latency_ms.calls) <= step.num_latencies
    text = context.report.lines["target of prune"]
    assert text.startswith("at most 40.0% of 14.1 ms was asked for")
    assert f"on abacus (desk), after {len(context.latency_ms.calls) - 1} tries" in text


def test_the_fastest_net_is_taken_and_told_where_none_is_fast_enough(net, spec):
    step = replace(STEP, target="latency", ratio=0.6, round_to=1)
    context = keep_weights(make_context(spec))
    context.latency_ms = FakeMeter(overhead_ms=1e3)
    pruned, _ = step.apply(net, context)
    assert widths(pruned) == [2, 4, 2, 2, 1]
    assert context.report.lines["target of prune"].startswith("not reached: at most 40.0%")


def test_a_plan_times_nothing_and_says_what_stands_in(net, spec):
    context = keep_weights(make_context(spec))
    context.is_dry = True
    replace(STEP, target="latency", ratio=0.3).apply(net, context)
    assert "in the place of latency" in context.report.lines["target of prune"]


def test_only_a_latency_target_times_nets():
    assert [replace(STEP, target=t).num_latencies for t in ("ratio", "macs", "params")] == [0] * 3
    assert replace(STEP, target="latency").num_latencies == 9


def test_protected_layers_keep_their_output_channels_and_may_lose_inputs(net, spec):
    context = keep_weights(make_context(spec))
    pruned, _ = replace(STEP, protect=["merge"]).apply(net, context)
    assert widths(pruned) == [8, 16, 16, 16, 1]  # `refine` is added to `merge`
    assert pruned.merge[0].in_channels == 24
    assert context.report.lines["protected from pruning"] == (
        "merge: 1 groups of channels stay whole"
    )


def test_a_misspelt_protected_layer_is_told(net, spec):
    with pytest.raises(MedliteError, match=r"protect: no layer is called 'refin\.0', did you mean"):
        replace(STEP, protect=["refin.0"]).apply(net, make_context(spec))


def test_logits_and_images_are_whole_whatever_goes(classes):
    step = replace(GLOBAL, ratio=0.8, round_to=1)
    pruned, _ = step.apply(TinyClassifier().eval(), keep_weights(make_context(classes)))
    assert pruned.head.out_features == 3
    assert pruned.features[0][0].in_channels == 1


def test_a_globally_pruned_net_runs_in_onnx_runtime(net, spec, tmp_path):
    step = replace(GLOBAL, target="macs", round_to=1)
    pruned, _ = step.apply(net, keep_weights(make_context(spec)))
    artifact = export(
        pruned, format="onnx", input_shape=spec.input_shape, directory=tmp_path, stem="net"
    )
    image = make_batch(spec, 2).image
    session = onnxruntime.InferenceSession(str(artifact.path))
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    assert (torch.from_numpy(logits) - pruned(image)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "speed"}, "target: 'speed' is not one of ratio, macs, params, latency"),
        ({"scope": "total"}, "scope: 'total' is not one of local, global"),
        ({"max_ratio": 1.0}, r"max_ratio: 1.0 is not in \(0, 1\)"),
        ({"iterations": 2}, "iterations: 2 is not from 1 to the 1 epochs"),
    ],
)
def test_wrong_choices_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        StructuredPruning(**({"epochs": 1, "learning_rate": 1e-3} | options))
