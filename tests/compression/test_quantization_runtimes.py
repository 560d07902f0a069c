"""Real integers: what the runtimes make of a quantised net."""

import numpy as np
import pytest
import torch
from torch import nn
from toy_world import (
    TinyClassifier,
    TinyUNet,
    assert_same_but_for_single_codes,
    make_batch,
    make_context,
    make_spec,
    train,
)

from medlite.compression.quantization import PostTrainingQuantization, QuantizationAwareTraining
from medlite.compression.quantized_graph import count_quantized
from medlite.export.export import export_all
from medlite.models.ultralight_vm_unet import UltraLightVMUNet
from medlite.report.environment import cuts_off_int8_sums
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.runtimes.openvino import OpenVinoRuntime
from medlite.types import Hardware

HARDWARE = Hardware(num_threads=1)
RUNTIMES = (OnnxRuntime(), OpenVinoRuntime())


def int8_operators(counts, *names):
    return sum(n for key, n in counts.items() if key.startswith("int8:") and key[5:] in names)


def exported(net, spec, directory):
    formats = [runtime.format for runtime in RUNTIMES]
    artifacts = export_all(
        net, formats=formats, input_shape=spec.input_shape, directory=directory, stem="net"
    )
    return [(runtime, artifacts[runtime.format]) for runtime in RUNTIMES]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.PReLU])
def test_all_quantised_convolutions_run_on_integers(tmp_path, activation):
    spec = make_spec()
    net = train(TinyUNet(activation), spec, epochs=2)
    quantised, _ = PostTrainingQuantization(calibration_samples=16).apply(net, make_context(spec))
    assert count_quantized(quantised) == 3
    for runtime, artifact in exported(quantised, spec, tmp_path):
        counts = runtime.count_operators(artifact, HARDWARE)
        assert artifact.precision == "int8"
        assert int8_operators(counts, "QLinearConv", "Convolution") == 3, (runtime.name, counts)
        if runtime.format == "onnx":
            assert int8_operators(counts, "QLinearConcat") == 1, counts


def test_runtimes_agree_with_torch(tmp_path):
    spec = make_spec()
    net = train(TinyUNet(), spec)
    step = QuantizationAwareTraining(epochs=2, learning_rate=1e-3, calibration_samples=16)
    quantised, _ = step.apply(net, make_context(spec))
    images = make_batch(spec, 8, seed=80).image
    reference = quantised(images).detach().numpy()
    for runtime, artifact in exported(quantised, spec, tmp_path):
        logits = runtime.load(artifact, HARDWARE)(images.numpy())
        assert_same_but_for_single_codes(logits, reference)
        assert ((logits > 0) == (reference > 0)).mean() > 0.999


class LargeSums(nn.Module):
    """Convolutions and a linear layer whose activations and weights are all near their largest.

    Two products of 8-bit weights leave 16 bits then.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(32), nn.Flatten(),
            nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3),
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("weight"):
                    parameter.abs_().add_(parameter.max())

    def forward(self, image):
        return self.layers(image)


def largest_error(weight_bits, tmp_path):
    """Runtime -> the largest difference from torch over the largest logit."""
    torch.manual_seed(0)
    spec = make_spec("classification", "multiclass", num_classes=3)
    step = PostTrainingQuantization(
        calibration_samples=16, weight_bits=weight_bits, keep_first_float=False, method="minmax"
    )
    quantised, _ = step.apply(LargeSums().eval(), make_context(spec))
    images = make_batch(spec, 8, seed=80).image
    reference = quantised(images).detach().numpy()
    differences = {
        runtime.name: np.abs(runtime.load(artifact, HARDWARE)(images.numpy()) - reference).max()
        for runtime, artifact in exported(quantised, spec, tmp_path)
    }
    return {name: error / np.abs(reference).max() for name, error in differences.items()}


def test_weights_of_seven_bits_give_the_same_sums_on_every_processor(tmp_path):
    # A code of the last rounding is 0.4 % of its range.
    assert max(largest_error(7, tmp_path).values()) < 0.01


@pytest.mark.skipif(cuts_off_int8_sums() is not True, reason="this processor's sums are exact")
def test_this_processor_cuts_off_sums_with_weights_of_eight_bits(tmp_path):
    assert max(largest_error(8, tmp_path).values()) > 0.1


def test_linear_layers_run_on_integers(tmp_path):
    spec = make_spec("classification", "multiclass", num_classes=3)
    net = TinyClassifier()
    net.head = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 3))
    step = PostTrainingQuantization(calibration_samples=16)
    quantised, _ = step.apply(train(net, spec, epochs=2), make_context(spec))
    assert count_quantized(quantised) == 3
    for runtime, artifact in exported(quantised, spec, tmp_path):
        counts = runtime.count_operators(artifact, HARDWARE)
        assert int8_operators(counts, "QLinearConv", "Convolution") == 2, (runtime.name, counts)
        assert int8_operators(counts, "QGemm", "FullyConnected") == 1, (runtime.name, counts)


@pytest.mark.slow
def test_every_quantised_operator_of_a_mamba_net_runs_on_integers(tmp_path):
    spec = make_spec()
    torch.manual_seed(0)
    net = UltraLightVMUNet(in_channels=1, num_classes=1)
    context = make_context(spec)
    quantised, _ = PostTrainingQuantization(calibration_samples=8).apply(net, context)
    kept = "encoders.0.mixer, 6 conv1d, 6 x_proj, 6 dt_proj, channel_bridge.conv, head"
    assert context.report.lines["kept in float"] == f"{kept}, 6 scans"
    for runtime, artifact in exported(quantised, spec, tmp_path):
        counts = runtime.count_operators(artifact, HARDWARE)
        assert int8_operators(counts, "QLinearConv", "Convolution") == 9, (runtime.name, counts)
        linear = int8_operators(counts, "QGemm", "QLinearMatMul", "FullyConnected")
        assert linear == count_quantized(quantised) - 9, (runtime.name, counts)
