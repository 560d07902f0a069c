"""One scan, exported by medlite and run by the engines that it deploys to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from medlite.export.export import export
from medlite.export.onnx_file import for_engine, translate
from medlite.models.layers.scans.selective import selective_scan
from medlite.models.layers.scans.ssd import ssd_scan
from medlite.runtimes.openvino_core import openvino_core
from medlite.types import Hardware
from scan_peers.cases import Case

SCANS = {"s6": selective_scan, "ssd": ssd_scan}


class Scan(nn.Module):
    """The scan alone: rates and direct path are weights, the rest comes in."""

    def __init__(self, case: Case, kind: str) -> None:
        super().__init__()
        _, _, A, _, _, D = case.operands(kind)
        self.scan = SCANS[kind]
        self.A = nn.Parameter(A[0])
        self.D = nn.Parameter(D[0])

    def forward(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """(B, L, D) outputs."""
        return self.scan(x, delta, self.A, B, C, self.D)


class PackedScan(nn.Module):
    """The same with one input, (B, 1, elements of x, delta, B and C)."""

    def __init__(self, case: Case, kind: str) -> None:
        super().__init__()
        self.scan = Scan(case, kind)
        self.shapes = [tuple(t.shape[1:]) for t in inputs(case, kind)]

    def forward(self, packed: Tensor) -> Tensor:
        """(B, L, D) outputs."""
        parts = packed.squeeze(1).split([length * width for length, width in self.shapes], 1)
        return self.scan(*(p.unflatten(1, s) for p, s in zip(parts, self.shapes, strict=True)))


def inputs(case: Case, kind: str) -> list[Tensor]:
    """x, delta, B and C without the axis of parameter sets."""
    x, delta, _, B, C, _ = case.operands(kind)
    return [t[:, 0].contiguous() for t in (x, delta, B, C)]


def write_onnx(case: Case, kind: str, engine: str, directory: Path) -> Path:
    """The file for `engine`, of static shape, in the form that medlite picks for it."""
    program = torch.export.export(Scan(case, kind).eval(), tuple(inputs(case, kind)))
    path = directory / f"{case.name}_{kind}_{engine}.onnx"
    for_engine(translate(program, engine), engine).save(path)
    return path


def open_onnxruntime(case: Case, kind: str, directory: Path) -> Callable[[], Tensor]:
    """A call on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = write_onnx(case, kind, "onnxruntime", directory)
    session = onnxruntime.InferenceSession(str(path), options)
    names = [value.name for value in session.get_inputs()]
    feeds = dict(zip(names, [t.numpy() for t in inputs(case, kind)], strict=True))
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


def open_openvino(case: Case, kind: str, directory: Path) -> Callable[[], Tensor]:
    """A call on one thread."""
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    path = write_onnx(case, kind, "openvino", directory)
    request = openvino_core().compile_model(path, "CPU", config).create_infer_request()
    arrays = [t.numpy() for t in inputs(case, kind)]
    return lambda: torch.from_numpy(request.infer(arrays)[0])


def open_executorch(case: Case, kind: str, directory: Path) -> Callable[[], Tensor]:
    """A call on one thread; samples one after another, operands in one tensor."""
    from medlite.runtimes.executorch import ExecuTorchRuntime

    packed = torch.cat([t.flatten(1) for t in inputs(case, kind)], 1).unsqueeze(1)
    artifact = export(
        PackedScan(case, kind),
        format="executorch",
        input_shape=tuple(packed.shape[1:]),
        directory=directory,
        stem=f"{case.name}_{kind}",
    )
    session = ExecuTorchRuntime().load(artifact, Hardware(num_threads=1))
    return lambda: torch.from_numpy(session(packed.numpy()))


SESSIONS = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "executorch": open_executorch,
}
