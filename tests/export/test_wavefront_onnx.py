# ruff: noqa: N803 - the letters of the paper
"""The ONNX form of the wavefront scan, run by ONNX Runtime and OpenVINO, against a loop."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from medlite.export.wavefront_onnx import translation_table
from medlite.models.layers.scans.reference import wavefront_scan_reference
from medlite.models.layers.scans.wavefront import wavefront_scan
from medlite.runtimes.openvino_core import openvino_core

NUM_STATES = 16


class Scan(nn.Module):
    """A scan alone, whose rates differ between the two sources."""

    def __init__(self, channels):
        super().__init__()
        rates = torch.arange(1.0, NUM_STATES + 1).repeat(2, channels, 1)
        self.A_log = nn.Parameter((rates * torch.tensor([1, 1.5])[:, None, None]).log())
        self.D = nn.Parameter(torch.linspace(-1, 1, channels))

    def forward(self, x, delta, B, C):
        return wavefront_scan(x, delta, -self.A_log.exp(), B, C, self.D)


def make_inputs(batch, height, width, channels):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    delta = 1e-3 * 100 ** torch.rand(batch, 2, height, width, channels, generator=generator)
    B, C = normal(batch, 2, height, width, NUM_STATES), normal(batch, height, width, NUM_STATES)
    return normal(batch, height, width, channels), delta, B, C


def scan_sequentially(net, inputs):
    x, delta, B, C = inputs
    A = -net.A_log.double().exp()
    return wavefront_scan_reference(x, delta, A, B, C, net.D).detach().numpy()


def to_onnx(net, inputs, path, *, any_batch=True):
    dynamic = {0: Dim("batch")} if any_batch else {}
    program = torch.export.export(net.eval(), inputs, dynamic_shapes=(dynamic,) * len(inputs))
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
    model = openvino_core().compile_model(path, "CPU", config)
    return model([value.numpy() for value in inputs])[0]


def relative_error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (16, 12), (7, 20)])
def test_both_runtimes_equal_the_loop_for_any_batch(tmp_path, size):
    net, path = Scan(8), tmp_path / "scan.onnx"
    to_onnx(net, make_inputs(2, *size, 8), path)
    for batch in (1, 3):
        inputs = make_inputs(batch, *size, 8)
        expected = scan_sequentially(net, inputs)
        for run in RUNTIMES.values():
            assert relative_error(run(path, inputs), expected) < 1e-6


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_both_runtimes_equal_the_loop_when_the_batch_is_fixed(tmp_path, runtime):
    net, path, inputs = Scan(8), tmp_path / "scan.onnx", make_inputs(2, 9, 13, 8)
    to_onnx(net, inputs, path, any_batch=False)
    assert relative_error(RUNTIMES[runtime](path, inputs), scan_sequentially(net, inputs)) < 1e-6


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_large_steps_neither_overflow_nor_lose_digits(tmp_path, runtime):
    net, path = Scan(4), tmp_path / "scan.onnx"
    x, delta, B, C = make_inputs(2, 12, 10, 4)
    inputs = (x, torch.where(delta > 0.05, 50.0, 0.0), B, C)
    to_onnx(net, inputs, path)
    actual = RUNTIMES[runtime](path, inputs)
    assert relative_error(actual, scan_sequentially(net, inputs)) < 1e-6


def test_graph_is_small_and_standard(tmp_path):
    model = to_onnx(Scan(8), make_inputs(2, 40, 30, 8), tmp_path / "scan.onnx")
    nodes = list(model.graph.all_nodes())
    assert {node.domain for node in nodes} == {""}
    assert sum(node.op_type == "Scan" for node in nodes) == 1
    assert len(nodes) < 80
