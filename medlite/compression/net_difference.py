"""How far two forms of one net are apart, and in which layer they part.

Shapes in docstrings: B batch, C channels, H W D height width depth.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BATCH_SIZE = 16


@torch.no_grad()
def relative_difference(first: nn.Module, second: nn.Module, images: Tensor) -> float:
    """The largest difference of the outputs, as a share of the largest output of `first`.

    Args:
        first: in evaluation mode.
        second: likewise.
        images: (B, C, H, W[, D]), run 16 at a time.

    Returns:
        0 or more; NaN where an output is not a number.
    """
    outputs = [
        torch.cat([net(part) for part in images.split(BATCH_SIZE)]) for net in (first, second)
    ]
    return _relative(*outputs)


@torch.no_grad()
def first_difference(
    first: nn.Module,
    second: nn.Module,
    images: Tensor,
    *,
    places: Collection[str],
    tolerance: float,
) -> str:
    """The name of the layer, in the order of the computation, from which the nets are apart.

    Args:
        first: in evaluation mode.
        second: likewise.
        images: (B, C, H, W[, D]).
        places: names of modules that should give the same in both nets.
        tolerance: of `relative_difference`, for the output of each layer.

    Returns:
        The name, or "the output" where no layer that is compared differs.
    """
    names = set(dict(first.named_modules())) & set(dict(second.named_modules()))
    compared = (names & set(places)) - {""}
    outputs: list[list[tuple[str, Tensor]]] = []
    for net in (first, second):
        with _keeping_outputs(net, compared) as kept:
            net(images)
        outputs.append(kept)
    for (name, one), (other_name, other) in zip(*outputs, strict=False):
        if name != other_name or one.shape != other.shape or not _relative(one, other) <= tolerance:
            return f"layer '{name}'"
    return "the output"


@contextmanager
def _keeping_outputs(net: nn.Module, names: set[str]) -> Iterator[list[tuple[str, Tensor]]]:
    kept: list[tuple[str, Tensor]] = []

    def keep(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            kept.append((name, output.clone()))

    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
        for name, module in net.named_modules()
        if name in names
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _relative(first: Tensor, second: Tensor) -> float:
    largest = first.abs().max().item()
    difference = (first - second).abs().max().item()
    if not difference:
        return 0.0
    return difference / largest if largest else math.inf
