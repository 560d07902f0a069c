import io
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.metrics import recall_score, roc_auc_score
from torch import nn
from toy_world import (
    TinyUNet,
    assert_same_but_for_single_codes,
    conv_block,
    make_batch,
    make_context,
    make_spec,
    train,
)

from medlite.compression.clinical_objective import ClinicalObjective, Score, noise_ratio
from medlite.compression.layer_switches import LayerSwitches
from medlite.compression.precision_search import (
    LayerSensitivity,
    counts_to_verify,
    most_sensitive_first,
)
from medlite.compression.quantized_graph import (
    activation_ranges,
    calibrate,
    convert,
    count_quantized,
    prepare,
)
from medlite.compression.quantizer import Int8Quantizer
from medlite.compression.selective_precision import SelectivePrecision
from medlite.errors import ConfigError, MedliteError
from medlite.export.export import export_all
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.types import Batch, Hardware

STEP = SelectivePrecision(calibration_samples=16, method="minmax", validation_batches=2)


class Chain(nn.Sequential):
    """Five convolutions in a row."""

    def __init__(self):
        blocks = [conv_block(inputs, 8, nn.ReLU) for inputs in (1, 8, 8, 8)]
        super().__init__(*blocks, nn.Conv2d(8, 1, 1))


def spoil(net, place):
    """Scale one channel between two layers up, and down again: no other output, in float."""
    before, after = net[place][1], net[place + 1][0]
    with torch.no_grad():
        for tensor in (before.weight, before.bias):
            tensor[0] *= 3e4
        after.weight[:, 0] /= 3e4
    return net


@pytest.fixture(scope="module")
def spoilt_chain():
    torch.manual_seed(0)
    return spoil(train(Chain(), make_spec()), 1)


def int8_quantizer(float_layers=()):
    return Int8Quantizer(
        keep_first_float=False, keep_last_float=False, keep_float=(), keep_layers=float_layers
    )


def calibrated(net, spec, float_layers=()):
    prepared = prepare(net, spec.input_shape, int8_quantizer(float_layers))
    calibrate(prepared, make_batch(spec, 16).image, batch_size=8, method="minmax")
    return prepared


def calibrated_switches(net, spec):
    switches = LayerSwitches(net, spec.input_shape, int8_quantizer)
    calibrate(switches.prepared, make_batch(spec, 16).image, batch_size=8, method="minmax")
    return switches


def objective(spec, kind, batches):
    return ClinicalObjective(kind=kind, spec=spec, batches=batches)


# the graph in which layers are switched


def test_without_any_layer_rounded_the_graph_is_the_float_net(trained_unet, spec):
    switches = calibrated_switches(trained_unet, spec)
    image = make_batch(spec, 4, seed=3).image
    with switches.rounding_only(()) as graph:
        assert torch.allclose(graph(image), trained_unet(image), atol=1e-4)


@pytest.mark.parametrize(
    "float_layers",
    [(), ("refine.0",), ("stem.0", "head"), ("down.1.0", "merge.0", "refine.0")],
)
def test_switched_layers_compute_what_a_graph_made_for_them_does(trained_unet, spec, float_layers):
    switches = calibrated_switches(trained_unet, spec)
    converted = convert(calibrated(trained_unet, spec, float_layers), spec.input_shape)
    assert count_quantized(converted) == 5 - len(float_layers)
    image = make_batch(spec, 8, seed=3).image
    with switches.rounding_only(set(switches.layers) - set(float_layers)) as graph:
        assert torch.allclose(graph(image), converted(image), atol=1e-5)


def test_switches_leave_no_trace(trained_unet, spec):
    switches = calibrated_switches(trained_unet, spec)
    image = make_batch(spec, 4, seed=3).image
    before, ranges = switches.prepared(image), activation_ranges(switches.prepared)
    with switches.rounding_only(("merge.0",)) as graph:
        assert not torch.equal(graph(10 * image), switches.prepared(image))
    assert torch.equal(switches.prepared(image), before)
    after = activation_ranges(switches.prepared)
    assert all(torch.equal(ranges[name], after[name]) for name in ranges)


def test_batch_normalisation_that_follows_no_layer_can_be_switched_over(spec):
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1)
    ).eval()
    switches = calibrated_switches(net, spec)
    with switches.rounding_only(("3",)) as graph:
        assert graph(make_batch(spec, 2).image).shape[0] == 2


def test_a_whole_path_keeps_its_own_layer_alone(spec):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 1)
            self.block = nn.Module()
            self.block.conv = nn.Conv2d(4, 4, 1)

        def forward(self, image):
            return self.block.conv(self.conv(image).relu())

    quantizer = int8_quantizer(("conv",))
    prepare(Twice(), spec.input_shape, quantizer)
    assert quantizer.float_layers == ("conv",)
    assert quantizer.quantized_layers == ("block.conv",)


# the objective


def test_macro_auc_and_worst_sensitivity_are_scikit_learns():
    spec = make_spec("classification", "multiclass", num_classes=3)
    torch.manual_seed(0)
    logits, target = torch.randn(60, 3), torch.randint(3, (60,))
    batches = [Batch(torch.zeros(60, 1, 2, 2), target, torch.arange(60))]
    auc = roc_auc_score(target, logits.softmax(1), multi_class="ovr")
    assert objective(spec, "metric", batches).score(logits).value == pytest.approx(auc, abs=1e-9)
    worst = recall_score(target, logits.argmax(1), average=None).min()
    found = objective(spec, "worst_sensitivity", batches).score(logits).value
    assert found == pytest.approx(worst, abs=1e-9)


def test_a_class_that_does_not_occur_is_not_the_worst():
    spec = make_spec("classification", "multiclass", num_classes=3)
    target = torch.tensor([0, 0, 1, 1])
    batches = [Batch(torch.zeros(4, 1, 2, 2), target, torch.arange(4))]
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 0])]
    assert objective(spec, "worst_sensitivity", batches).score(logits).value == pytest.approx(0.5)


@pytest.mark.parametrize(("kind", "sign"), [("metric", -1), ("ece", 1), ("nll", 1)])
def test_a_loss_is_positive_where_the_model_got_worse(spec, kind, sign):
    loss = objective(spec, kind, []).loss(Score(value=0.6), Score(value=0.5))
    assert loss == pytest.approx(sign * 0.1)


def test_a_class_that_is_lost_counts_where_another_was_never_found():
    spec = make_spec("classification", "multiclass", num_classes=3)
    target = torch.tensor([0, 0, 1, 1, 2, 2])
    judge = objective(
        spec, "worst_sensitivity", [Batch(torch.zeros(6, 1, 2, 2), target, torch.arange(6))]
    )
    before, after = (
        judge.score(torch.eye(3)[torch.tensor(decided)])
        for decided in ([0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0])
    )
    assert (before.value, after.value) == (0.0, 0.0)
    assert judge.loss(after, before) == pytest.approx(0.5)
    assert judge.loss(before, after) == pytest.approx(0.0)


def test_an_output_that_is_not_finite_loses_everything(spec):
    judge = objective(spec, "metric", [make_batch(spec, 4)])
    score = judge.score(torch.full((4, 1, 32, 32), torch.nan))
    assert judge.loss(score, Score(value=0.9)) == np.inf
    assert noise_ratio(torch.tensor([torch.nan]), torch.ones(1)) == np.inf


def test_images_without_the_classes_that_are_asked_for_are_refused():
    spec = make_spec("classification", "multiclass", num_classes=3)
    batches = [Batch(torch.zeros(4, 1, 2, 2), torch.zeros(4).long(), torch.arange(4))]
    with pytest.raises(MedliteError, match=r"objective=metric: auc cannot be measured on 4 valid"):
        objective(spec, "metric", batches).score(torch.randn(4, 3))


# the search


@pytest.mark.parametrize("needed", range(9))
def test_bisection_finds_what_trying_all_would_find(needed):
    counts = counts_to_verify(lambda count: float(count < needed), bound=8, margin=0.5)
    assert counts == list(range(needed, 9))


def test_bisection_looks_at_few_counts():
    seen = set()

    def loss_of(count):
        seen.add(count)
        return float(count < 37)

    assert counts_to_verify(loss_of, bound=100, margin=0.5)[0] == 37
    assert len(seen) <= 9


def test_layers_are_ordered_by_noise_or_by_the_objective():
    layers = [
        LayerSensitivity(name="a", noise_ratio=0.1, loss=0.0),
        LayerSensitivity(name="b", noise_ratio=0.2, loss=0.0),
        LayerSensitivity(name="c", noise_ratio=0.0, loss=0.3),
    ]
    ordered = {
        by: "".join(layer.name for layer in most_sensitive_first(layers, order_by=by))
        for by in ("noise", "objective")
    }
    assert ordered == {"noise": "bac", "objective": "cba"}


# the step


@pytest.mark.parametrize("order_by", ["noise", "objective"])
def test_the_layers_on_both_sides_of_an_outlier_stay_in_float_and_no_other(
    spoilt_chain, spec, order_by
):
    step, context = replace(STEP, order_by=order_by), make_context(spec)
    quantised, state = step.apply(spoilt_chain, context)
    assert sorted(state["float_layers"]) == ["1.0", "2.0"]
    assert count_quantized(quantised) == 3
    judge = objective(spec, "metric", context.validation_batches(2))
    in_float, deployed, all_int8 = (
        judge.score(judge.logits(net)).value
        for net in (spoilt_chain, quantised, calibrated(spoilt_chain, spec))
    )
    assert in_float - deployed <= step.margin
    assert in_float - all_int8 > 0.1
    text = context.report.lines["selective precision"]
    assert f"float {in_float:.4f}" in text
    assert f"deployed {deployed:.4f} with 2 of them in float; within the margin of 0.01" in text
    assert context.report.lines["kept in float"].count("(found by the search)") == 2
    assert "INT8 in 3 of 5 weighted layers" in context.report.lines["quantisation"]


def test_a_net_that_loses_nothing_is_rounded_everywhere(trained_unet, spec):
    context = make_context(spec)
    quantised, state = STEP.apply(trained_unet, context)
    assert state["float_layers"] == []
    assert count_quantized(quantised) == 5
    assert context.report.lines["kept in float"] == "nothing"
    assert context.report.lines["most sensitive layers"].count(" dB") == 5


def test_too_few_layers_in_float_are_confessed_and_the_best_is_deployed(spoilt_chain, spec):
    step, context = replace(STEP, max_float_layers=1), make_context(spec)
    _, state = step.apply(spoilt_chain, context)
    assert len(state["float_layers"]) <= 1
    text = context.report.lines["selective precision"]
    assert "THE MARGIN OF 0.01 COULD NOT BE MET: with up to 1 layers in float" in text


def test_layers_are_added_while_the_converted_net_fails(spoilt_chain, spec, monkeypatch):
    monkeypatch.setattr(LayerSwitches, "_rounded_tensors", lambda *_: set())  # sees no harm
    step, context = replace(STEP, max_float_layers=4), make_context(spec)
    _, state = step.apply(spoilt_chain, context)
    assert {"1.0", "2.0"} <= set(state["float_layers"])
    assert "within the margin" in context.report.lines["selective precision"]


def test_layers_that_are_named_stay_in_float_in_any_case(trained_unet, spec):
    context = make_context(spec)
    quantised, state = replace(STEP, keep_float=("refine",)).apply(trained_unet, context)
    assert count_quantized(quantised) == 4
    assert state["float_layers"] == []
    assert context.report.lines["kept in float"] == "refine.0"


def test_validation_images_teach_the_ranges_nothing(trained_unet, spec):
    context = make_context(spec)
    plain = context.validation_batches
    context.validation_batches = lambda n: [b._replace(image=100 * b.image) for b in plain(n)]
    _, state = replace(STEP, margin=10.0).apply(trained_unet, context)
    context.validation_batches = plain
    _, expected = replace(STEP, margin=10.0).apply(trained_unet, context)
    assert all(torch.equal(state["ranges"][k], v) for k, v in expected["ranges"].items())


def test_restored_net_is_the_same_to_the_last_bit(spoilt_chain, spec):
    quantised, state = STEP.apply(spoilt_chain, make_context(spec))
    file = io.BytesIO()
    torch.save((state, quantised.state_dict()), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    torch.manual_seed(5)
    restored = STEP.restore(Chain(), state, spec)
    restored.load_state_dict(weights, strict=True)
    image = make_batch(spec, 4, seed=3).image
    assert (restored(image) - quantised(image)).abs().max().item() == 0.0


def test_the_net_that_was_given_stays_as_it_was(trained_unet, spec):
    before = {name: tensor.clone() for name, tensor in trained_unet.state_dict().items()}
    STEP.apply(trained_unet, make_context(spec))
    after = trained_unet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_runtime_computes_the_chosen_layers_in_float_and_the_others_in_integers(
    spoilt_chain, spec, tmp_path
):
    quantised, _ = STEP.apply(spoilt_chain, make_context(spec))
    artifact = export_all(
        quantised, formats=["onnx"], input_shape=spec.input_shape, directory=tmp_path, stem="net"
    )["onnx"]
    counts = OnnxRuntime().count_operators(artifact, Hardware(num_threads=1))
    assert counts["int8:QLinearConv"] == 3
    assert sum(n for name, n in counts.items() if name in ("Conv", "FusedConv")) == 2
    image = make_batch(spec, 4, seed=3).image
    session = onnxruntime.InferenceSession(artifact.path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    reference = quantised(image).numpy()
    assert_same_but_for_single_codes(logits, reference)


def test_the_plan_measures_nothing(trained_unet, spec):
    def refuse(_):
        raise AssertionError

    context = replace(
        make_context(spec), is_dry=True, calibration_images=refuse, validation_batches=refuse
    )
    STEP.apply(trained_unet, context)
    text = context.report.lines["selective precision"]
    assert text.startswith("each of 5 layers will be rounded alone; then the fewest, at most 4,")


def test_a_misspelt_layer_is_refused_with_the_right_name(trained_unet, spec):
    step = replace(STEP, keep_float=("merg.0",))
    with pytest.raises(MedliteError, match=r"no layer is called 'merg.0', did you mean 'merge.0'"):
        step.apply(trained_unet, make_context(spec))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "dice"}, "objective: 'dice' is not one of metric, worst_sensitivity, ece"),
        ({"margin": -0.1}, "margin: -0.1 is not 0 or more"),
        ({"max_float_layers": -1}, "max_float_layers: -1 is not a whole number from 0 up"),
        ({"order_by": "size"}, "order_by: 'size' is not one of noise, objective"),
        ({"validation_batches": 0}, "validation_batches: 0 is not a whole number from 1 up"),
        ({"calibration_samples": 0}, "calibration_samples: 0 is not a whole number from 1 up"),
        ({"method": "median"}, "method: 'median' is not one of minmax, mse"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SelectivePrecision(**options)


def test_a_unet_restores_with_a_layer_of_any_kind_in_float(trained_unet, spec):
    step = replace(STEP, margin=0.0, objective="nll", max_float_layers=4)
    quantised, state = step.apply(trained_unet, make_context(spec))
    restored = step.restore(TinyUNet(), state, spec)
    restored.load_state_dict(quantised.state_dict(), strict=True)
    image = make_batch(spec, 4, seed=3).image
    assert (restored(image) - quantised(image)).abs().max().item() == 0.0
