"""A convolution or linear layer as two or three smaller ones, and what that keeps and costs.

Shapes in docstrings: N output channels, M input channels, K elements of the kernel, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

Factorable = nn.Linear | nn.Conv2d | nn.Conv3d
"""the layers that can be factorised"""

Ranks = tuple[int, ...]
"""(rank,) of a pointwise layer; (output rank, input rank) of a convolution with a larger kernel"""

NUM_SWEEPS = 5
"""orthogonal iterations; the energy that is kept hardly changes after two or three"""


@dataclass(frozen=True)
class Positions:
    """At how many places one image makes a layer work, all its calls together."""

    num_in: int
    num_out: int


def is_pointwise(layer: Factorable) -> bool:
    """Whether the layer is one matrix: linear, or a convolution with a kernel of one element."""
    return isinstance(layer, nn.Linear) or math.prod(layer.kernel_size) == 1


def full_ranks(layer: Factorable) -> Ranks:
    """The ranks at which nothing is lost."""
    num_outputs, num_inputs = layer.weight.shape[:2]
    return (min(num_outputs, num_inputs),) if is_pointwise(layer) else (num_outputs, num_inputs)


def unfoldings(layer: Factorable) -> tuple[Tensor, ...]:
    """The matrices whose ranks are lowered, in the order of the ranks."""
    weight = _three_axes(layer)
    matrices = weight.flatten(1), weight.transpose(0, 1).flatten(1)
    return matrices[: len(full_ranks(layer))]


def kept_energy(layer: Factorable) -> Tensor:
    """The share of the squared weights that every choice of ranks keeps.

    For a matrix these are its singular values squared (Eckart and Young). For a kernel they are
    the squares of its core in the bases of the higher-order SVD (De Lathauwer et al., SIAM J.
    Matrix Anal. Appl. 21(4), 2000), of which the iteration behind `factors` can only keep more.

    Returns:
        float64, (R,) or (N, M): at index i the share at rank i + 1.
    """
    matrices = unfoldings(layer)
    if len(matrices) == 1:
        squares = torch.linalg.svdvals(matrices[0]).square()
        kept = squares.cumsum(0)
    else:
        bases = (_leading_basis(matrix, len(matrix)) for matrix in matrices)
        core = _project(_three_axes(layer), *bases)
        kept = core.square().sum(2).cumsum(0).cumsum(1)
    total = kept.flatten()[-1]
    return kept / total if total > 0 else torch.ones_like(kept)


def num_macs(layer: Factorable, at: Positions, ranks: Iterable[Any] = ()) -> Any:
    """Multiply-adds an image, of the layer as it is or of its factors.

    Args:
        layer: any that can be factorised.
        at: where it works.
        ranks: whole numbers, or tensors of them that broadcast; none for the layer as it is.
    """
    num_outputs, num_inputs = layer.weight.shape[:2]
    kernel = layer.weight[0, 0].numel()
    match tuple(ranks):
        case (rank,):
            return at.num_out * rank * (num_inputs + num_outputs)
        case (rank, in_rank):
            core_and_last = in_rank * kernel + num_outputs
            return at.num_in * num_inputs * in_rank + at.num_out * rank * core_and_last
        case _:
            return at.num_out * num_inputs * num_outputs * kernel


def factors(layer: Factorable, ranks: Ranks) -> list[Tensor]:
    """The weights of the layers that take the layer's place, first to last.

    A matrix is cut by its SVD, the singular values shared evenly. A kernel is cut along its
    channels only ("Tucker-2", Kim et al., "Compression of Deep Convolutional Neural Networks for
    Fast and Low Power Mobile Applications", arXiv:1511.06530), by orthogonal iteration from the
    higher-order SVD (De Lathauwer et al., SIAM J. Matrix Anal. Appl. 21(4), 2000).
    """
    weight = _three_axes(layer)
    if len(ranks) == 1:
        left, values, right = torch.linalg.svd(weight[..., 0], full_matrices=False)
        rank, roots = ranks[0], values.sqrt()
        cut = [roots[:rank, None] * right[:rank], left[:, :rank] * roots[:rank]]
    else:
        out_basis, in_basis = _tucker_bases(weight, *ranks)
        cut = [in_basis.T, _project(weight, out_basis, in_basis), out_basis]
    shapes = factor_shapes(layer, ranks)
    return [
        part.to(layer.weight.dtype).reshape(shape).contiguous()
        for part, shape in zip(cut, shapes, strict=True)
    ]


def factor_shapes(layer: Factorable, ranks: Ranks) -> list[tuple[int, ...]]:
    """The shapes of `factors`."""
    num_outputs, num_inputs, *kernel = layer.weight.shape
    ones = (1,) * len(kernel)
    first, last = (ranks[-1], num_inputs, *ones), (num_outputs, ranks[0], *ones)
    return [first, last] if len(ranks) == 1 else [first, (*ranks, *kernel), last]


def factorised(layer: Factorable, weights: list[Tensor]) -> nn.Sequential:
    """The layers with these weights in sequence; the last one has the bias.

    Stride, padding and dilation are those of the factor with the kernel, for a pointwise
    convolution of the first. As the factors before it have no bias, padding stays what it was.
    """
    geometry = {} if isinstance(layer, nn.Linear) else _geometry(layer)
    place = 1 if len(weights) == 3 else 0
    parts = [
        _layer(layer, weight, geometry if index == place else {})
        for index, weight in enumerate(weights)
    ]
    parts[-1].bias = layer.bias
    return nn.Sequential(*parts).train(layer.training)


def _layer(like: Factorable, weight: Tensor, geometry: dict[str, Any]) -> Factorable:
    num_outputs, num_inputs, *kernel = weight.shape
    sizes = (num_inputs, num_outputs, *([tuple(kernel)] if kernel else []))
    # On "meta" nothing is drawn from the random numbers of the run.
    layer = cast("Any", type(like))(*sizes, bias=False, device="meta", **geometry)
    layer.weight = nn.Parameter(weight, like.weight.requires_grad)
    return layer


def _geometry(layer: nn.Conv2d | nn.Conv3d) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "padding_mode")
    return {name: getattr(layer, name) for name in names}


def _three_axes(layer: Factorable) -> Tensor:
    """The weight (N, M, K) in float64."""
    num_outputs, num_inputs = layer.weight.shape[:2]
    return layer.weight.detach().double().reshape(num_outputs, num_inputs, -1)


def _tucker_bases(weight: Tensor, rank: int, in_rank: int) -> tuple[Tensor, Tensor]:
    in_basis = _leading_basis(weight.transpose(0, 1).flatten(1), in_rank)
    for _ in range(NUM_SWEEPS):
        narrow = torch.einsum("nmk,mi->nik", weight, in_basis)
        out_basis = _leading_basis(narrow.flatten(1), rank)
        narrow = torch.einsum("nmk,nr->mrk", weight, out_basis)
        in_basis = _leading_basis(narrow.flatten(1), in_rank)
    return out_basis, in_basis


def _leading_basis(matrix: Tensor, rank: int) -> Tensor:
    """(rows, rank): the left singular vectors of the largest singular values, largest first."""
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]


def _project(weight: Tensor, out_basis: Tensor, in_basis: Tensor) -> Tensor:
    """The core (R, R, K) of a weight (N, M, K)."""
    narrow = torch.einsum("nmk,mi->nik", weight, in_basis)
    return torch.einsum("nik,nr->rik", narrow, out_basis)
