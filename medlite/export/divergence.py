"""The first layer at which an exported graph parts from torch.

Every tensor of the file that torch's exported program also has is made an output, and the two
are compared in the order of the program. Making a tensor an output keeps the engine from fusing
across it: a difference that only a fusion brings can vanish here.

Shapes in docstrings: B batch, C channels, H W D height width depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from medlite.errors import ExportError, did_you_mean
from medlite.export.onnx_file import OUTPUT_NAME, to_onnx
from medlite.export.trace import deployable, layer_of, trace
from medlite.runtimes.openvino_core import openvino_core
from medlite.types import Artifact

TOLERANCES = {"fp32": 1e-3, "int8": 0.1, "w4": 1e-3, "w3": 1e-3, "w2": 1e-3}
TOLERANCES |= {"fp16": 0.02, "bf16": 0.1}
"""By precision, relative to the layer's largest value; 8-bit layers may differ by some steps."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Where two forms of a network part."""

    layer: str
    """dotted name of the module; "" where torch does not know it"""
    operator: str
    """such as "aten.conv2d.default" """
    tensor: str
    """name of the tensor in the exported file"""
    relative_difference: float
    """the largest difference over the layer's largest value"""
    num_compared: int
    """tensors that could be compared"""

    def __str__(self) -> str:
        where = f"layer '{self.layer}'" if self.layer else f"tensor '{self.tensor}'"
        return f"{where} ({self.operator}) differs by {self.relative_difference:.2g} of its range"


def first_divergence(net: nn.Module, artifact: Artifact, images: np.ndarray) -> Divergence | None:
    """The first layer of `artifact` whose output is not that of `net`; None where all agree.

    Args:
        net: the network that was exported.
        artifact: in the format "onnx" (read by ONNX Runtime) or "openvino".
        images: (B, C, H, W[, D]) float32, real ones; a few are enough.

    Raises:
        ExportError: a format that does not show its tensors.
    """
    if artifact.format not in _READERS:
        options = did_you_mean(artifact.format, _READERS)
        message = f"format {artifact.format!r} does not show its inner tensors; {options}"
        raise ExportError(message)
    engine, read = _READERS[artifact.format]
    program = to_onnx(trace(deployable(net), artifact.input_shape), engine).exported_program
    assert program is not None
    recorder = _Recorder(program.module(check_guards=False))
    with torch.no_grad():
        recorder.run(torch.from_numpy(images))
    found = read(artifact, images, recorder.values)
    tolerance = TOLERANCES[artifact.precision]
    for name, node in recorder.nodes.items():
        if name in found:
            difference = _relative_difference(recorder.values[name], found[name])
            if not difference <= tolerance:
                return Divergence(
                    layer=layer_of(node),
                    operator=str(node.target),
                    tensor=name,
                    relative_difference=difference,
                    num_compared=len(found),
                )
    return None


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every float tensor that it makes, by the name in the file."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, np.ndarray] = {}
        self.nodes: dict[str, fx.Node] = {}
        returned = module.graph.output_node().all_input_nodes
        self._names = dict.fromkeys(returned, OUTPUT_NAME)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node of the graph."""
        value = super().run_node(n)
        is_computed = n.op == "call_function" and isinstance(value, Tensor)
        if is_computed and value.is_floating_point():
            name = self._names.get(n, n.name)
            self.values[name] = value.numpy()
            self.nodes[name] = n
        return value


def _read_onnx(
    artifact: Artifact, images: np.ndarray, names: Iterable[str]
) -> dict[str, np.ndarray]:
    import onnx
    import onnxruntime

    model = onnx.load(artifact.path)
    outputs = {output.name for output in model.graph.output}
    inner = {name for node in model.graph.node for name in node.output} & set(names) - outputs
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inner)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    shown = [output.name for output in session.get_outputs()]
    values = session.run(shown, {session.get_inputs()[0].name: images})
    return dict(zip(shown, values, strict=True))


def _read_openvino(
    artifact: Artifact, images: np.ndarray, names: Iterable[str]
) -> dict[str, np.ndarray]:
    core = openvino_core()
    model = core.read_model(artifact.path)
    outputs = {name for output in model.outputs for name in output.get_names()}
    ports = (output for layer in model.get_ops() for output in layer.outputs())
    inner = {name for port in ports for name in port.get_names()} & set(names) - outputs
    model.add_outputs(sorted(inner))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(images)
    return {
        name: results[index]
        for index, output in enumerate(compiled.outputs)
        for name in output.get_names()
    }


_Reader = Callable[[Artifact, np.ndarray, Iterable[str]], dict[str, np.ndarray]]

_READERS: dict[str, tuple[str, _Reader]] = {
    "onnx": ("onnxruntime", _read_onnx),
    "openvino": ("openvino", _read_openvino),
}
"""By format: the engine, and how the tensors that are asked for are had from it."""


READABLE_FORMATS = tuple(_READERS)
"""those that show their inner tensors; an engine that fuses ahead of time, as ExecuTorch with
XNNPACK does, has none to show"""


def _relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    scale = max(float(np.abs(ours).max(initial=0.0)), float(np.finfo(np.float32).tiny))
    return float(np.abs(ours - theirs).max(initial=0.0)) / scale
