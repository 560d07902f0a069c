"""Weights of few bits in an ONNX file, as small as the format has them.

The exporter writes codes of any width as one byte each. ONNX has INT4 from opset 21 on and INT2
from opset 25 on, packed two or four to a byte, and DequantizeLinear reads both. ONNX Runtime 1.32
runs both; OpenVINO 2026.4 refuses to load INT2. Neither computes with them: the weights are
unpacked to float first.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

OPSETS = {4: 21, 3: 21, 2: 25}
"""by the bits of the weights, the first one that has a type for them"""

UNPACKER = "DequantizeLinear"


def pack_weights(model: ir.Model, bits: int, engine: str) -> None:
    """Store the codes of rounded weights as INT4 or INT2, in place; they stay the same numbers.

    Args:
        model: whose integer codes are weights alone; of the opset that `OPSETS` says.
        bits: of the weights, at most 4.
        engine: "onnxruntime" or "openvino".
    """
    is_tiny = bits == 2 and engine == "onnxruntime"
    kind = ml_dtypes.int2 if is_tiny else ml_dtypes.int4
    for node in _unpackers(model):
        codes = node.inputs[0]
        assert codes is not None
        assert codes.const_value is not None
        packed = ir.Tensor(codes.const_value.numpy().astype(kind), name=codes.name)
        codes.const_value = packed
        codes.dtype = packed.dtype
        node.resize_inputs(2)  # zero points are zero, and would have to be of the same type


def merge_equal_scales(model: ir.Model) -> None:
    """Give weights whose channels all have one scale that scale once, in place.

    That is the form that targets without a scale for each channel read.
    """
    for node in _unpackers(model):
        scales = node.inputs[1]
        assert scales is not None
        values = scales.const_value
        if values is None or values.size < 2 or np.ptp(values.numpy()) > 0:
            continue
        name = f"{node.outputs[0].name}_scale"
        node.replace_input_with(1, _constant(model, name, values.numpy().reshape(-1)[0]))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            name = f"{node.outputs[0].name}_zero_point"
            node.replace_input_with(2, _constant(model, name, np.int8(0)))
        node.attributes.pop("axis", None)
        if scales.is_initializer() and not scales.uses():
            model.graph.initializers.pop(str(scales.name))


def _unpackers(model: ir.Model) -> list[ir.Node]:
    """The nodes that turn constant codes into weights."""
    nodes = [node for node in model.graph if node.op_type == UNPACKER]
    return [node for node in nodes if node.inputs[0] is not None and _is_constant(node.inputs[0])]


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None


def _constant(model: ir.Model, name: str, number: np.generic) -> ir.Value:
    tensor = ir.Tensor(np.asarray(number), name=name)
    shape, kind = ir.Shape([]), ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    model.graph.register_initializer(value)
    return value
