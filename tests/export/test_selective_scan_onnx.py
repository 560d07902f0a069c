# ruff: noqa: N803 - the letters of the paper
"""The ONNX form of the scan, run by ONNX Runtime and OpenVINO, against a float64 loop."""

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from torch import nn
from torch.export import Dim

from medlite.export.selective_scan_onnx import translation_table
from medlite.models.layers.scans.selective import selective_scan
from medlite.models.ultralight_vm_unet import UltraLightVMUNet

NUM_STATES = 16


class Scan(nn.Module):
    def __init__(self, channels):
        super().__init__()
        rates = torch.arange(1.0, NUM_STATES + 1)
        self.A_log = nn.Parameter(rates.log().repeat(channels, 1))
        self.D = nn.Parameter(torch.linspace(-1, 1, channels))

    def forward(self, x, delta, B, C):
        return selective_scan(x, delta, -self.A_log.exp(), B, C, self.D)


def make_inputs(batch, length, channels):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, channels, generator=generator)
    delta = 1e-3 * 100 ** torch.rand(batch, length, channels, generator=generator)
    B, C = torch.randn(2, batch, length, NUM_STATES, generator=generator)
    return x, delta, B, C


def scan_sequentially(net, inputs):
    """The definition, one token after the other, in float64."""
    x, delta, B, C = (t.double() for t in inputs)
    A = -net.A_log.double().exp()
    state, outputs = 0, []
    for t in range(x.shape[1]):
        u = delta[:, t] * x[:, t]
        state = torch.exp(delta[:, t, :, None] * A) * state + u[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    return (torch.stack(outputs, dim=1) + net.D * x).detach().numpy()


def to_onnx(net, inputs, path, *, any_batch=True):
    shapes = tuple({0: Dim("batch")} for _ in inputs) if any_batch else None
    program = torch.export.export(net.eval(), inputs, dynamic_shapes=shapes)
    translated = torch.onnx.export(
        program, dynamo=True, verbose=False, custom_translation_table=translation_table()
    )
    translated.save(path)
    return translated.model


def run_onnxruntime(path, inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    names = [value.name for value in session.get_inputs()]
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return session.run(None, feeds)[0]


def run_openvino(path, inputs):
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(path, "CPU", config)
    return model([value.numpy() for value in inputs])[0]


def relative_error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("length", "channels"),
    [(1024, 12), (64, 12), (64, 24), (4, 32), (1, 12), (50, 16), (77, 64), (16, 1024)],
)
def test_both_runtimes_equal_the_loop_for_any_batch(tmp_path, runtime, length, channels):
    net, path = Scan(channels), tmp_path / "scan.onnx"
    to_onnx(net, make_inputs(2, length, channels), path)
    for batch in (1, 4):
        inputs = make_inputs(batch, length, channels)
        actual = RUNTIMES[runtime](path, inputs)
        assert relative_error(actual, scan_sequentially(net, inputs)) < 1e-6


@pytest.mark.parametrize("channels", [12, 32])
def test_openvino_equals_the_loop_when_the_batch_is_fixed(tmp_path, channels):
    net, path, inputs = Scan(channels), tmp_path / "scan.onnx", make_inputs(2, 64, channels)
    to_onnx(net, inputs, path, any_batch=False)
    assert relative_error(run_openvino(path, inputs), scan_sequentially(net, inputs)) < 1e-6


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("channels", [12, 32])
def test_large_steps_neither_overflow_nor_lose_digits(tmp_path, runtime, channels):
    net, path = Scan(channels), tmp_path / "scan.onnx"
    x, delta, B, C = make_inputs(2, 100, channels)
    inputs = (x, torch.where(delta > 0.05, 50.0, 0.0), B, C)
    to_onnx(net, inputs, path)
    actual = RUNTIMES[runtime](path, inputs)
    assert relative_error(actual, scan_sequentially(net, inputs)) < 1e-6


def test_graph_is_small_standard_and_loops_over_the_root_of_the_length(tmp_path):
    model = to_onnx(Scan(12), make_inputs(2, 1024, 12), tmp_path / "scan.onnx")
    operators = [node.op_type for node in model.graph]
    assert {node.domain for node in model.graph.all_nodes()} == {""}
    assert operators.count("Scan") == 3
    assert len(operators) < 50
    advance = next(node for node in model.graph if node.op_type == "Scan")
    assert advance.inputs[2].shape[0] == 32


def make_lively_ultralight():
    """Fresh weights hide the scan; here it weighs as much as the rest."""
    torch.manual_seed(0)
    net = UltraLightVMUNet(in_channels=1, num_classes=1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("x_proj.weight"):
                parameter.mul_(10)
            if name.endswith("dt_proj.bias"):
                parameter.add_(3)
    return net


@pytest.fixture(scope="module")
def ultralight(tmp_path_factory):
    net, path = make_lively_ultralight(), tmp_path_factory.mktemp("ultralight") / "net.onnx"
    to_onnx(net, (torch.zeros(2, 1, 64, 64),), path)
    return net, path


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("batch", [1, 3])
def test_ultralight_vm_unet_equals_torch_in_both_runtimes(ultralight, runtime, batch):
    net, path = ultralight
    images = torch.randn(batch, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(images).numpy()
    assert relative_error(RUNTIMES[runtime](path, (images,)), expected) < 1e-4
