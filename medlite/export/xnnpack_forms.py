"""Operators of torch in the words of XNNPACK.

What XNNPACK does not take is left to ExecuTorch's own kernels, which are slower and cut the graph
in two. Each function computes what the operator does that it stands for, for fixed sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _unsqueeze(x: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape.insert(dim % (x.ndim + 1), 1)
    return x.reshape(shape)


def _squeeze(x: Tensor, dims: int | Sequence[int]) -> Tensor:
    axes = {dim % x.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    return x.reshape([side for axis, side in enumerate(x.shape) if side != 1 or axis not in axes])


def _select(x: Tensor, dim: int, index: int) -> Tensor:
    return _squeeze(x.narrow(dim, index % x.shape[dim], 1), dim)


def _split(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    starts = [sum(sizes[:position]) for position in range(len(sizes))]
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def _split_evenly(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    length = x.shape[dim]
    return _split(x, [min(size, length - start) for start in range(0, length, size)], dim)


def _chunk(x: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    return _split_evenly(x, -(-x.shape[dim] // chunks), dim)


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Over the rows of a matrix: `_softmax` of a map, which has four axes, is wrong in XNNPACK."""
    x = x if dtype is None else x.to(dtype)
    last = x.transpose(dim, -1)
    rows = aten._softmax.default(last.reshape(-1, last.shape[-1]), 1, False)
    return rows.view(last.shape).transpose(dim, -1)


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """relu(x) + log(1 + exp(-|x|)); the logarithm by Kahan's correction of 1 + e.

    With u = 1 + e as it was rounded, log(1 + e) = e log(u) / (u - 1). Where that rounds to 1, the
    number above it has the right quotient, which is 1 to the last bit.
    """
    if beta != 1:
        return _softplus(x * float(beta)) * (1.0 / beta)
    e = (-x.abs()).exp()
    u = (e + 1.0).clamp(min=1.0 + 2.0**-23)
    return x.relu() + e * (u.log() / (u - 1.0))


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *_: Any
) -> Tensor:
    """A layer normalisation of each group, for which there is a quick kernel."""
    rows = x.reshape(x.shape[0], num_groups, -1)
    normal = aten.layer_norm.default(rows, [rows.shape[-1]], None, None, eps).reshape(x.shape)
    shape = (-1, *(1,) * (x.ndim - 2))
    normal = normal if weight is None else normal * weight.view(shape)
    return normal if bias is None else normal + bias.view(shape)


def _mean(
    x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """Over the last two of four axes, which stay: the one mean that XNNPACK takes."""
    if x.ndim == 4 and keepdim and dims is not None and {dim % 4 for dim in dims} == {2, 3}:
        return NotImplemented
    axes = [dim % x.ndim for dim in (dims or range(x.ndim))]
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    shape = [x.shape[axis] for axis in kept]
    rows = x.permute(*kept, *axes).reshape(1, torch.Size(shape).numel(), 1, -1)
    means = aten.mean.dim(rows, [2, 3], True)
    return means.reshape(
        [1 if i in axes else n for i, n in enumerate(x.shape)] if keepdim else shape
    )


XNNPACK_FORMS: dict[Any, Callable[..., Any]] = {
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.select.int: _select,
    aten.split_with_sizes.default: _split,
    aten.split.Tensor: _split_evenly,
    aten.chunk.default: _chunk,
    aten.softmax.int: _softmax,
    aten.softplus.default: _softplus,
    aten.group_norm.default: _group_norm,
    aten.mean.dim: _mean,
}
