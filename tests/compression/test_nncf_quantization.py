import io
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from toy_world import (
    TinyClassifier,
    TinyUNet,
    make_batch,
    make_context,
    make_spec,
    train,
)

from medlite.compression.nncf_quantization import NncfQuantization
from medlite.compression.quantized_graph import count_quantized, count_scans
from medlite.errors import ConfigError, MedliteError, MissingDependency
from medlite.export.export import export_all
from medlite.models.ultralight_vm_unet import UltraLightVMUNet
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.runtimes.openvino import OpenVinoRuntime
from medlite.types import Hardware

pytest.importorskip("nncf", reason="the extra medlite[nncf] is not installed")

STEP = NncfQuantization(calibration_samples=16)
RUNTIMES = (OnnxRuntime(), OpenVinoRuntime())
HARDWARE = Hardware(num_threads=1)


class Tokens(nn.Module):
    """Patches, and the linear layers of two perceptrons with a normalisation before each."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 8, stride=8)
        self.first = nn.Sequential(
            nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        )
        self.second = nn.Sequential(
            nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, image):
        tokens = self.patches(image).flatten(2).transpose(1, 2)
        tokens = tokens + self.first(tokens)
        tokens = tokens + self.second(tokens)
        return self.head(tokens.mean(1))


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(0)
    return train(Tokens(), make_spec("classification", "multiclass", num_classes=3))


def saved_and_loaded(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def int8_operators(counts, *names):
    return sum(n for key, n in counts.items() if key.startswith("int8:") and key[5:] in names)


def exported(net, spec, directory):
    artifacts = export_all(
        net,
        formats=[runtime.format for runtime in RUNTIMES],
        input_shape=spec.input_shape,
        directory=directory,
        stem="net",
    )
    return [(runtime, artifacts[runtime.format]) for runtime in RUNTIMES]


@pytest.mark.parametrize("bias_correction", ["none", "fast", "full"])
def test_restored_net_is_the_same_to_the_last_bit(trained_unet, spec, bias_correction):
    step = replace(STEP, bias_correction=bias_correction)
    quantised, state = step.apply(trained_unet, make_context(spec))
    state, weights = saved_and_loaded((state, quantised.state_dict()))
    torch.manual_seed(5)
    restored = step.restore(TinyUNet(), state, spec)
    restored.load_state_dict(weights, strict=True)
    image = make_batch(spec, 5, seed=3).image
    assert (restored(image) - quantised(image)).abs().max().item() == 0.0


def test_a_smoothed_net_restores_to_the_last_bit(tokens, classes):
    step = replace(STEP, smooth_quant=True)
    quantised, state = step.apply(tokens, make_context(classes))
    assert any(name.endswith("_factor") for name in quantised.state_dict())
    state, weights = saved_and_loaded((state, quantised.state_dict()))
    restored = step.restore(Tokens(), state, classes)
    restored.load_state_dict(weights, strict=True)
    image = make_batch(classes, 5, seed=3).image
    assert (restored(image) - quantised(image)).abs().max().item() == 0.0


def test_it_stays_close_to_float(trained_unet, spec):
    image = make_batch(spec, 16, seed=50).image
    quantised, _ = STEP.apply(trained_unet, make_context(spec))
    reference = trained_unet(image)
    error = (quantised(image) - reference).square().mean().sqrt()
    assert error < 0.05 * reference.std()


def test_full_bias_correction_makes_the_mean_error_smaller(classes):
    net = train(TinyClassifier(), classes)
    image = make_batch(classes, 64, seed=7).image
    context = make_context(classes)
    shift = {}
    for correction in ("none", "full"):
        step = replace(STEP, calibration_samples=64, bias_correction=correction)
        quantised, _ = step.apply(net, context)
        with torch.no_grad():
            shift[correction] = (quantised(image) - net(image)).mean(0).abs().max()
    assert shift["full"] < 0.7 * shift["none"]


def test_smoothing_helps_a_layer_whose_input_has_outliers(classes, tokens):
    with torch.no_grad():
        spoilt = Tokens().eval()
        spoilt.load_state_dict(tokens.state_dict())
        for block in (spoilt.first, spoilt.second):
            block[0].weight[0] *= 300
            block[0].bias[0] *= 300
            block[1].weight[:, 0] /= 300
        image = make_batch(classes, 16, seed=50).image
        error = {}
        for smooth in (False, True):
            step = replace(STEP, smooth_quant=smooth, bias_correction="none")
            quantised, _ = step.apply(spoilt, make_context(classes))
            error[smooth] = (quantised(image) - spoilt(image)).square().mean()
    assert error[True] < 0.2 * error[False]


@pytest.mark.parametrize("smooth_quant", [False, True])
def test_named_layers_stay_in_float(tokens, classes, smooth_quant):
    step = replace(STEP, smooth_quant=smooth_quant, keep_float=("first.1",))
    context = make_context(classes)
    quantised, _ = step.apply(tokens, context)
    assert count_quantized(quantised) == 3
    assert context.report.lines["kept in float"] == "patches, first.1, head"
    assert "INT8 in 3 of 6 weighted layers by NNCF" in context.report.lines["quantisation"]


def test_convolutions_run_on_integers_and_agree_with_torch(trained_unet, spec, tmp_path):
    quantised, _ = STEP.apply(trained_unet, make_context(spec))
    image = make_batch(spec, 8, seed=80).image
    reference = quantised(image).detach().numpy()
    for runtime, artifact in exported(quantised, spec, tmp_path):
        counts = runtime.count_operators(artifact, HARDWARE)
        assert artifact.precision == "int8"
        assert int8_operators(counts, "QLinearConv", "Convolution") == 3, (runtime.name, counts)
        logits = runtime.load(artifact, HARDWARE)(image.numpy())
        # NNCF leaves weights of 8 bits, whose sums processors without VNNI cut off.
        assert np.abs(logits - reference).max() < 0.1 * np.abs(reference).max()
        assert ((logits > 0) == (reference > 0)).mean() > 0.99


def test_smoothed_linear_layers_run_on_integers(tokens, classes, tmp_path):
    quantised, _ = replace(STEP, smooth_quant=True).apply(tokens, make_context(classes))
    for runtime, artifact in exported(quantised, classes, tmp_path):
        counts = runtime.count_operators(artifact, HARDWARE)
        names = ("QGemm", "QLinearMatMul", "FullyConnected")
        assert int8_operators(counts, *names) == 4, (runtime.name, counts)


@pytest.mark.slow
def test_a_mamba_net_keeps_its_scans_and_runs_on_integers(tmp_path):
    spec = make_spec()
    torch.manual_seed(0)
    net = UltraLightVMUNet(in_channels=1, num_classes=1).eval()
    context = make_context(spec)
    quantised, _ = NncfQuantization(calibration_samples=4, bias_correction="fast").apply(
        net, context
    )
    assert count_scans(quantised) == 6
    assert context.report.lines["kept in float"].endswith("6 scans")
    for runtime, artifact in exported(quantised, spec, tmp_path):
        counts = runtime.count_operators(artifact, HARDWARE)
        assert int8_operators(counts, "QLinearConv", "Convolution") > 0, (runtime.name, counts)


def test_the_net_that_was_given_stays_as_it_was(trained_unet, spec):
    before = {name: tensor.clone() for name, tensor in trained_unet.state_dict().items()}
    STEP.apply(trained_unet, make_context(spec))
    after = trained_unet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_plan_calibrates_nothing(trained_unet, spec):
    def refuse(_):
        raise AssertionError

    context = replace(make_context(spec), is_dry=True, calibration_images=refuse)
    STEP.apply(trained_unet, context)
    assert "INT8 in 3 of 5 weighted layers by NNCF" in context.report.lines["quantisation"]


def test_a_missing_package_is_told_and_not_needed_to_restore(trained_unet, spec, monkeypatch):
    _, state = STEP.apply(trained_unet, make_context(spec))
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingDependency, match=r"needs 'nncf'.*pip install 'medlite\[nncf\]'"):
        STEP.apply(trained_unet, replace(make_context(spec), is_dry=True))
    assert count_quantized(STEP.restore(trained_unet, state, spec)) == 3


def test_a_misspelt_layer_is_refused_with_the_right_name(trained_unet, spec):
    step = replace(STEP, keep_float=("merg.0",))
    with pytest.raises(MedliteError, match=r"no layer is called 'merg.0', did you mean 'merge.0'"):
        step.apply(trained_unet, make_context(spec))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_samples": 0}, "calibration_samples: 0 is not a whole number from 1 up"),
        ({"bias_correction": "slow"}, "bias_correction: 'slow' is not one of none, fast, full"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        NncfQuantization(**options)
