"""One scan, exported by medlite and run by the engines that it deploys to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from medlite.export.onnx_file import for_engine
from medlite.export.selective_scan_onnx import translation_table
from medlite.models.layers.scans.selective import selective_scan
from scan_peers.cases import Case


class Scan(nn.Module):
    """The scan alone: rates and direct path are weights, the rest comes in."""

    def __init__(self, A: Tensor, D: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.D = nn.Parameter(D)

    def forward(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """(B, L, D) outputs."""
        return selective_scan(x, delta, self.A, B, C, self.D)


def exported(case: Case, runtime: str, kind: str, directory: Path) -> Path:
    """The file for `runtime`, of static shape, in the form that medlite picks for it."""
    x, delta, A, B, C, D = case.operands()
    net = Scan(A[0], D[0]).eval()
    program = torch.export.export(net, (x[:, 0], delta[:, 0], B[:, 0], C[:, 0]))
    path = directory / f"{case.name}_{runtime}.onnx"
    translated = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        optimize=False,
        custom_translation_table=translation_table(),
    )
    assert translated is not None
    for_engine(translated, runtime).save(path)
    return path


def run_onnxruntime(case: Case, kind: str, path: Path) -> Callable[[], Tensor]:
    """A call of the file on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    names = [value.name for value in session.get_inputs()]
    feeds = dict(zip(names, _inputs(case), strict=True))
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


def run_openvino(case: Case, kind: str, path: Path) -> Callable[[], Tensor]:
    """A call of the file on one thread."""
    import openvino

    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    inputs = _inputs(case)
    return lambda: torch.from_numpy(request.infer(inputs)[0])


def _inputs(case: Case) -> list:
    x, delta, _, B, C, _ = case.operands()
    return [t[:, 0].contiguous().numpy() for t in (x, delta, B, C)]


SESSIONS = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}
