"""Pruning the inner channels of Mamba blocks, which run through all of a block's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

INNER_AXES = (
    ("in_proj", "weight", 0),
    ("conv1d", "weight", 0),
    ("conv1d", "bias", 0),
    ("x_proj", "weight", 1),
    ("dt_proj", "weight", 0),
    ("dt_proj", "bias", 0),
    ("out_proj", "weight", 1),
    ("", "A_log", 0),
    ("", "D", 0),
)
"""(part, tensor, axis) that hold the inner channels; `in_proj` holds them twice, for the scan's
input and for the gate"""

_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "A_log", "D")


def is_mamba(module: nn.Module) -> bool:
    """Whether a module has the parts of a Mamba block, by the names of the published code."""
    return all(hasattr(module, part) for part in _PARTS)


def score_inner(block: nn.Module, score: Callable[[Tensor], Tensor]) -> Tensor:
    """The importance of every inner channel (D,).

    Args:
        block: a Mamba block.
        score: a weight -> the importance of each of its elements, same shape.
    """
    total = torch.zeros(_num_inner(block))
    for part, name, axis in INNER_AXES:
        tensor = _tensor(block, part, name)
        if tensor is None or part == "":
            continue
        other_axes = [other for other in range(tensor.ndim) if other != axis]
        scores = score(tensor).sum(dim=other_axes) if other_axes else score(tensor)
        scores = scores.view(-1, len(total)).sum(0)
        total += (scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny)).cpu()
    return total


def keep_inner(block: nn.Module, kept: Sequence[int]) -> None:
    """Remove all inner channels of a Mamba block but `kept` (ascending), in place."""
    num_inner = _num_inner(block)
    for part, name, axis in INNER_AXES:
        tensor = _tensor(block, part, name)
        if tensor is None:
            continue
        copies = tensor.shape[axis] // num_inner
        indices = torch.tensor([copy * num_inner + k for copy in range(copies) for k in kept])
        chosen = tensor.detach().index_select(axis, indices.to(tensor.device))
        setattr(_owner(block, part), name, nn.Parameter(chosen, tensor.requires_grad))
    _set_sizes(block, len(kept))


def _set_sizes(block: nn.Module, num_inner: int) -> None:
    sizes = {
        "in_proj": {"out_features": 2 * num_inner},
        "conv1d": dict.fromkeys(("in_channels", "out_channels", "groups"), num_inner),
        "x_proj": {"in_features": num_inner},
        "dt_proj": {"out_features": num_inner},
        "out_proj": {"in_features": num_inner},
        "": {"d_inner": num_inner} if hasattr(block, "d_inner") else {},
    }
    for part, numbers in sizes.items():
        vars(_owner(block, part)).update(numbers)


def _num_inner(block: nn.Module) -> int:
    return len(block.get_parameter("D"))


def _owner(block: nn.Module, part: str) -> nn.Module:
    return block.get_submodule(part)


def _tensor(block: nn.Module, part: str, name: str) -> nn.Parameter | None:
    return getattr(_owner(block, part), name)
