# ruff: noqa: N803 - the letters of the paper
"""OpenVINO's silent error in loop bodies, and that what we write never meets it."""

import numpy as np
import onnx_ir as ir
import openvino
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.export import Dim

from medlite.export.onnx_file import for_engine
from medlite.export.selective_scan_onnx import translation_table
from medlite.models.layers.scans.selective import selective_scan
from medlite.runtimes.openvino_core import openvino_core

SHAPE, LENGTH = (16, 24), 16


def loop(factors):
    """The recurrence h = decay h + v as an ONNX Scan, the product's operands in the given order."""

    def value(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    body = helper.make_graph(
        [
            helper.make_node("Mul", factors, ["product"]),
            helper.make_node("Add", ["product", "v"], ["h_next"]),
            helper.make_node("Identity", ["h_next"], ["y"]),
        ],
        "step",
        [value("h", SHAPE), value("decay", SHAPE), value("v", SHAPE)],
        [value("h_next", SHAPE), value("y", SHAPE)],
    )
    inputs = ["h0", "decays", "values"]
    node = helper.make_node("Scan", inputs, ["last", "ys"], body=body, num_scan_inputs=2)
    graph = helper.make_graph(
        [node],
        "loop",
        [value("h0", SHAPE), *(value(name, [LENGTH, *SHAPE]) for name in inputs[1:])],
        [value("ys", [LENGTH, *SHAPE])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def error_of(factors):
    generator = np.random.default_rng(0)
    decays = generator.random((LENGTH, *SHAPE), dtype=np.float32)
    start, *values = generator.standard_normal((LENGTH + 1, *SHAPE), dtype=np.float32)
    model = openvino_core().read_model(loop(factors).SerializeToString())
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    actual = compiled([start, decays, np.stack(values)])[0]
    state, expected = start.astype(np.float64), []
    for decay, v in zip(decays, values, strict=True):
        state = decay * state + v
        expected.append(state)
    return np.abs(actual - np.stack(expected)).max()


def test_openvino_is_right_when_the_state_is_the_first_factor():
    assert error_of(["h", "decay"]) < 1e-5


def test_openvino_is_wrong_when_the_state_is_the_second_factor():
    """The reason for the rule; skipped as soon as the rule is not needed any more."""
    error = error_of(["decay", "h"])
    if error < 1e-5:
        pytest.skip(f"OpenVINO {openvino.__version__} is right for both orders")
    assert error > 0.1


class Scan(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.A = nn.Parameter(-torch.rand(channels, 16))
        self.D = nn.Parameter(torch.ones(channels))

    def forward(self, x, delta, B, C):
        return selective_scan(x, delta, self.A, B, C, self.D)


def follow(body, value):
    """`value` and all that is computed from it."""
    values = {value}
    for node in body:
        if not values.isdisjoint(node.inputs):
            values.update(node.outputs)
    return values


@pytest.mark.parametrize("channels", [12, 64, 1024])
def test_every_loop_that_is_written_has_the_state_first(channels):
    tokens, weights = torch.rand(2, 8000, channels), torch.rand(2, 8000, 16)
    inputs = (tokens, tokens, weights, weights)
    shapes = ({0: Dim("batch")},) * 4
    program = torch.export.export(Scan(channels), inputs, dynamic_shapes=shapes)
    translated = torch.onnx.export(
        program, verbose=False, optimize=False, custom_translation_table=translation_table()
    )
    model = for_engine(translated, "openvino").model
    loops = [node for node in model.graph if node.op_type == "Scan"]
    assert loops
    for node in loops:
        body = node.attributes["body"].as_graph()
        states = follow(body, body.inputs[0])
        products = [n for n in body if n.op_type == "Mul" and not states.isdisjoint(n.inputs)]
        assert products
        assert all(product.inputs[0] in states for product in products)
        assert all(isinstance(value.type, ir.TensorType) for value in body.inputs)
