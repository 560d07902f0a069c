# ruff: noqa: N803 - the letters of the paper
"""The ONNX form of the scan, run by ONNX Runtime and OpenVINO, against a float64 loop."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from medlite.export.onnx_file import for_engine
from medlite.export.selective_scan_onnx import translation_table
from medlite.models.layers.scans.reference import selective_scan_reference
from medlite.models.layers.scans.selective import selective_scan
from medlite.models.ultralight_vm_unet import UltraLightVMUNet
from medlite.runtimes.openvino_core import openvino_core

NUM_STATES = 16


class Scan(nn.Module):
    """A scan alone; with several parameter sets they differ in their rates."""

    def __init__(self, channels, sets=None):
        super().__init__()
        rates = torch.arange(1.0, NUM_STATES + 1).repeat(channels, 1)
        skips = torch.linspace(-1, 1, channels)
        if sets:
            factors = torch.arange(1.0, sets + 1)
            rates = factors[:, None, None] * rates
            skips = factors[:, None] * skips
        self.A_log = nn.Parameter(rates.log())
        self.D = nn.Parameter(skips)

    def forward(self, x, delta, B, C):
        return selective_scan(x, delta, -self.A_log.exp(), B, C, self.D)


def make_inputs(batch, length, channels, sets=None):
    generator = torch.Generator().manual_seed(0)
    leading = (batch, sets) if sets else (batch,)
    x = torch.randn(*leading, length, channels, generator=generator)
    delta = 1e-3 * 100 ** torch.rand(*leading, length, channels, generator=generator)
    B, C = torch.randn(2, *leading, length, NUM_STATES, generator=generator)
    return x, delta, B, C


def scan_sequentially(net, inputs):
    x, delta, B, C = inputs
    A, D = -net.A_log.double().exp(), net.D
    return selective_scan_reference(x, delta, A, B, C, D).detach().numpy()


def to_onnx(net, inputs, path, engine, *, any_batch=True, any_length=False):
    dynamic = {0: Dim("batch")} if any_batch else {}
    if any_length:
        dynamic |= {inputs[0].ndim - 2: Dim("length", min=2)}
    program = torch.export.export(net.eval(), inputs, dynamic_shapes=(dynamic,) * len(inputs))
    translated = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        optimize=False,
        custom_translation_table=translation_table(),
    )
    finished = for_engine(translated, engine)
    finished.save(path)
    return finished.model


def run_onnxruntime(path, inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    names = [value.name for value in session.get_inputs()]
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return session.run(None, feeds)[0]


def run_openvino(path, inputs):
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino_core().compile_model(path, "CPU", config)
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
    to_onnx(net, make_inputs(2, length, channels), path, runtime)
    for batch in (1, 4):
        inputs = make_inputs(batch, length, channels)
        actual = RUNTIMES[runtime](path, inputs)
        assert relative_error(actual, scan_sequentially(net, inputs)) < 1e-6


@pytest.mark.parametrize("channels", [12, 32])
def test_openvino_equals_the_loop_when_the_batch_is_fixed(tmp_path, channels):
    net, path, inputs = Scan(channels), tmp_path / "scan.onnx", make_inputs(2, 64, channels)
    to_onnx(net, inputs, path, "openvino", any_batch=False)
    assert relative_error(run_openvino(path, inputs), scan_sequentially(net, inputs)) < 1e-6


STRESS = {
    "up to 50": lambda delta: delta * 500,
    "zero with spikes of 20": lambda delta: torch.where(delta > 0.08, 20.0, 0.0),
    "a thousandth": lambda delta: delta * 1e-3,
    "all zero": torch.zeros_like,
}
"""What is done to the step sizes; 1021 tokens are no multiple of anything."""


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("channels", [12, 128])
def test_no_step_size_overflows_or_loses_digits(tmp_path, runtime, channels):
    net, path = Scan(channels), tmp_path / "scan.onnx"
    x, delta, B, C = make_inputs(2, 1021, channels)
    to_onnx(net, (x, delta, B, C), path, runtime)
    for name, change in STRESS.items():
        inputs = (x, change(delta), B, C)
        actual = RUNTIMES[runtime](path, inputs)
        assert relative_error(actual, scan_sequentially(net, inputs)) < 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_65536_tokens_lose_no_digits(tmp_path, runtime):
    net, path, inputs = Scan(16), tmp_path / "scan.onnx", make_inputs(1, 65536, 16)
    to_onnx(net, inputs, path, runtime, any_batch=False)
    actual = RUNTIMES[runtime](path, inputs)
    assert relative_error(actual, scan_sequentially(net, inputs)) < 1e-6


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("sets", "length", "channels"), [(4, 49, 96), (4, 16, 4), (2, 300, 12), (3, 1500, 8)]
)
def test_parameter_sets_equal_the_loop(tmp_path, runtime, sets, length, channels):
    net, path = Scan(channels, sets), tmp_path / "scan.onnx"
    to_onnx(net, make_inputs(2, length, channels, sets), path, runtime)
    for batch in (1, 3):
        inputs = make_inputs(batch, length, channels, sets)
        actual = RUNTIMES[runtime](path, inputs)
        assert relative_error(actual, scan_sequentially(net, inputs)) < 1e-6


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("sets", "channels"), [(None, 12), (None, 300), (2, 40)])
def test_one_file_takes_any_length(tmp_path, runtime, sets, channels):
    net, path = Scan(channels, sets), tmp_path / "scan.onnx"
    to_onnx(net, make_inputs(2, 100, channels, sets), path, runtime, any_length=True)
    for length in (3, 64, 257):
        inputs = make_inputs(1, length, channels, sets)
        actual = RUNTIMES[runtime](path, inputs)
        assert relative_error(actual, scan_sequentially(net, inputs)) < 1e-6


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("length", "channels", "num_loops"),
    [(16384, 12, {"onnxruntime": 2, "openvino": 1}), (500, 1024, 1), (64, 12, 0)],
)
def test_graph_is_small_and_standard(tmp_path, runtime, length, channels, num_loops):
    """Lanes where a token is little work, a plain loop where it is much, none where it is short."""
    num_loops = num_loops[runtime] if isinstance(num_loops, dict) else num_loops
    inputs = make_inputs(2, length, channels)
    model = to_onnx(Scan(channels), inputs, tmp_path / "scan.onnx", runtime)
    operators = [node.op_type for node in model.graph]
    assert {node.domain for node in model.graph.all_nodes()} == {""}
    assert operators.count("Scan") == num_loops
    assert len(operators) < 300


class FoldedScan(Scan):
    """Parts (B, 8, L, D) of an image, each scanned for itself."""

    def forward(self, x, delta, B, C):
        return super().forward(*(t.flatten(0, 1) for t in (x, delta, B, C)))


def test_parts_that_are_folded_into_the_batch_count_as_work(tmp_path):
    """Eight times as much a token: enough for a plain loop instead of lanes."""
    folded = make_inputs(2, 1000, 64, sets=8)
    model = to_onnx(FoldedScan(64), folded, tmp_path / "scan.onnx", "onnxruntime")
    assert [node.op_type for node in model.graph].count("Scan") == 1
    model = to_onnx(Scan(64), make_inputs(2, 1000, 64), tmp_path / "scan.onnx", "onnxruntime")
    assert [node.op_type for node in model.graph].count("Scan") == 2


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


@pytest.fixture(scope="module", params=RUNTIMES)
def ultralight(request, tmp_path_factory):
    net, path = make_lively_ultralight(), tmp_path_factory.mktemp("ultralight") / "net.onnx"
    to_onnx(net, (torch.zeros(2, 1, 64, 64),), path, request.param)
    return net, path, RUNTIMES[request.param]


@pytest.mark.parametrize("batch", [1, 3])
def test_ultralight_vm_unet_equals_torch_in_both_runtimes(ultralight, batch):
    net, path, run = ultralight
    images = torch.randn(batch, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(images).numpy()
    assert relative_error(run(path, (images,)), expected) < 1e-4
