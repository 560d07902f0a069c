"""The selective scan of Mamba as one opaque operator, `torch.ops.medlite.selective_scan`.

    h_t = exp(delta_t A) h_{t-1} + (delta_t x_t) B_t        y_t = C_t . h_t + D x_t

(Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
arXiv 2312.00752, equations 2a-2b and algorithm 2.) Export, quantisation, pruning and FLOP
counters see a single node with a derivative. Inside, a kernel is picked by device and by what
is installed: compiled loops (numba) on the CPU, or lanes of ATen operations anywhere.

Letters: B batch, P parameter sets (such as the directions of a 2-D scan), L tokens, D channels,
N states.
"""

# ruff: noqa: N803, PLR0917 - the letters and the argument order of the paper

from __future__ import annotations

import math
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.utils.flop_counter import register_flop_formula

from medlite.models.layers.scans import lanes, unrolled


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Scan `x` with input-dependent steps; the letters are those of the paper.

    Computes in float32 (or float64 where `x` is that), also under autocast. Scans with
    parameters of their own run side by side where all operands carry the axis P.

    Args:
        x: (B, [P,] L, D) inputs.
        delta: (B, [P,] L, D) step sizes, not negative (softplus already applied).
        A: ([P,] D, N) negative decay rates.
        B: (B, [P,] L, N) input weights.
        C: (B, [P,] L, N) read-out weights.
        D: ([P,] D) weights of the direct path.

    Returns:
        (B, [P,] L, D) outputs.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, delta, A, B, C, D = (t if t.dtype == dtype else t.to(dtype) for t in (x, delta, A, B, C, D))
    if x.ndim == 4:
        return torch.ops.medlite.selective_scan(x, delta, A, B, C, D)
    x, delta, B, C = (t.unsqueeze(1) for t in (x, delta, B, C))
    return torch.ops.medlite.selective_scan(x, delta, A[None], B, C, D[None]).squeeze(1)


def kernel_for(x: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` compute a scan over `x`."""
    fits_loops = x.device.type == "cpu" and x.dtype == torch.float32
    return (_compiled_loops() if fits_loops else None) or lanes


@cache
def _compiled_loops() -> ModuleType | None:
    """The loops that numba compiles; None where it is not there, or not for this Python."""
    if find_spec("numba") is None:
        return None
    try:
        from medlite.models.layers.scans import compiled
    except ImportError as error:
        warnings.warn(f"numba cannot be used, so scans are slower: {error}", stacklevel=2)
        return None
    return compiled


@torch.library.custom_op("medlite::selective_scan", mutates_args=())
def _scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return kernel_for(x).forward(x, delta, A, B, C, D)


@torch.library.custom_op("medlite::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernel_for(x).backward(grad, x, delta, A, B, C, D)


@_scan.register_fake
def _(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_scan_backward.register_fake
def _(grad: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in operands)


def _save_operands(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.medlite.selective_scan_backward(grad, *ctx.saved_tensors)


_scan.register_autograd(_differentiate, setup_context=_save_operands)
register_decomposition(torch.ops.medlite.selective_scan.default, type="pre_autograd")(
    unrolled.unrolled_scan
)


@register_flop_formula(torch.ops.medlite.selective_scan)
def _count_flops(x_shape: Any, delta_shape: Any, A_shape: Any, *_: Any, **__: Any) -> int:
    """9 B L D N + 2 B L D: the count that the Mamba literature uses."""
    return (9 * A_shape[-1] + 2) * math.prod(x_shape)
