"""Every form of the scan under one name: a call without arguments for a case and a phase."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from medlite.models.layers.scans import lanes
from medlite.models.layers.scans.reference import selective_scan_reference, ssd_scan_reference
from scan_peers import deployed, eager, native
from scan_peers.cases import Case, Operands

Run = Callable[[], tuple[Tensor, ...]]
"""Returns the outputs, and in training the derivatives by x, delta, A, B, C and D."""

PHASES = ("forward", "training")

LONGEST_LOOP = 1024
"""Tokens; the derivative of the loop costs time that grows with their square."""


MOST_UNROLLED = 2**21
"""Of B L D N elements, what a form without loops is tried with."""


class Unavailable(Exception):  # noqa: N818 - reads as what it is
    """A variant that this machine or this case cannot have, and why."""


def prepare(variant: str, case: Case, phase: str) -> Run:
    """The variant as a call, compiled or exported.

    Raises:
        Unavailable: it has no such row.
    """
    return VARIANTS[variant](case, phase)


def kind_of(variant: str) -> str:
    """Which recurrence a variant computes."""
    return "ssd" if variant.startswith("ssd_") else "s6"


def true_values(case: Case, phase: str, kind: str) -> tuple[Tensor, ...]:
    """What `Run` should return, in float64."""
    operands = Operands(*(t.double() for t in case.operands(kind)))
    reference = selective_scan_reference if kind == "s6" else ssd_scan_reference
    outputs = (reference(*operands),)
    if phase == "forward":
        return outputs
    differentiate = lanes.backward if kind == "s6" else torch.ops.medlite.ssd_scan_backward
    return outputs + differentiate(_upstream(case).double(), *operands)


def _upstream(case: Case) -> Tensor:
    """The derivative by the outputs."""
    return torch.randn(case.operands().x.shape, generator=torch.Generator().manual_seed(1))


def _run_kernel(kernel: ModuleType, case: Case, phase: str) -> Run:
    operands, grad = case.operands(), _upstream(case)
    if phase == "forward":
        return lambda: (kernel.forward(*operands),)
    return lambda: (kernel.forward(*operands), *kernel.backward(grad, *operands))


def _native(case: Case, phase: str) -> Run:
    try:
        native.library()
    except native.CompilerMissing as error:
        raise Unavailable(str(error)) from error
    return _run_kernel(native, case, phase)


def _torch(case: Case, phase: str) -> Run:
    return _run_kernel(lanes, case, phase)


def _ssd(case: Case, phase: str) -> Run:
    scan, scan_back = torch.ops.medlite.ssd_scan, torch.ops.medlite.ssd_scan_backward
    operands, grad = case.operands("ssd"), _upstream(case)
    if phase == "forward":
        return lambda: (scan(*operands),)
    return lambda: (scan(*operands), *scan_back(grad, *operands))


def _numba(case: Case, phase: str) -> Run:
    _require("numba")
    from medlite.models.layers.scans import compiled

    return _run_kernel(compiled, case, phase)


def _mambapy(case: Case, phase: str) -> Run:
    _require("mambapy")
    return _run_eager(eager.scan_with_mambapy, case, phase)


def _reference(case: Case, phase: str) -> Run:
    if phase == "training" and case.length > LONGEST_LOOP:
        message = f"its derivative takes minutes for more than {LONGEST_LOOP} tokens"
        raise Unavailable(message)
    return _run_eager(eager.scan_by_loop, case, phase)


def _run_eager(scan: Callable[..., Tensor], case: Case, phase: str) -> Run:
    operands, grad = case.operands(), _upstream(case)
    if phase == "forward":
        return torch.no_grad()(lambda: (scan(*operands),))

    def train() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in operands]
        outputs = scan(*leaves)
        return outputs.detach(), *torch.autograd.grad(outputs, leaves, grad)

    return train


def _deployed(runtime: str, kind: str) -> Callable[[Case, str], Run]:
    def build(case: Case, phase: str) -> Run:
        if phase == "training":
            message = "it does not train"
            raise Unavailable(message)
        _require(runtime)
        if runtime == "executorch" and case.num_elements > MOST_UNROLLED:
            message = "it has no loops, and would hold all states at once"
            raise Unavailable(message)
        call = deployed.SESSIONS[runtime](case, kind, _scratch_directory())
        return lambda: (call().unsqueeze(1),)

    return build


@cache
def _scratch_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="selective_scan_"))


def _require(package: str) -> None:
    if find_spec(package) is None:
        message = f"{package} is not installed"
        raise Unavailable(message)


VARIANTS: dict[str, Callable[[Case, str], Run]] = {
    "native": _native,
    "torch": _torch,
    "numba": _numba,
    "onnxruntime": _deployed("onnxruntime", "s6"),
    "openvino": _deployed("openvino", "s6"),
    "executorch": _deployed("executorch", "s6"),
    "mambapy": _mambapy,
    "reference": _reference,
    "ssd_torch": _ssd,
    "ssd_onnxruntime": _deployed("onnxruntime", "ssd"),
    "ssd_openvino": _deployed("openvino", "ssd"),
    "ssd_executorch": _deployed("executorch", "ssd"),
}
"""Those that begin with "ssd_" compute the scan of Mamba-2, on as many elements."""
