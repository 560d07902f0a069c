"""native.cpp, compiled for this machine and called through ctypes: the limit of one core."""

# ruff: noqa: PLR0917 - the argument order of the paper

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
OPTIONS = ["-O3", "-march=native", "-ffast-math", "-std=c++17", "-shared", "-fPIC"]


class CompilerMissing(Exception):  # noqa: N818 - reads as what it is
    """There is no g++ on this machine, or it refuses the source."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        CompilerMissing: with what is missing or wrong.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        message = "there is no g++"
        raise CompilerMissing(message)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "native.so"
        command = [compiler, *OPTIONS, str(SOURCE), "-o", str(path)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise CompilerMissing(run.stderr)
        return ctypes.CDLL(str(path))


def forward(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """As `medlite.models.layers.scans.lanes.forward`, for contiguous float32."""
    y = torch.empty_like(x)
    library().scan_forward(*_sizes(x), *_pointers(x, delta, A, B, C, D, y))
    return y


def backward(
    grad: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, ...]:
    """As `medlite.models.layers.scans.lanes.backward`, for contiguous float32."""
    operands = (x, delta, A, B, C, D)
    grads = tuple(torch.zeros_like(t) for t in operands)
    library().scan_backward(*_sizes(x), *_pointers(grad, *operands, *grads))
    return grads


def _sizes(x: Tensor) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in x.shape]


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]
