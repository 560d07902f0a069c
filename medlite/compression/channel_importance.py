"""How much each unit of a group of channels matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.compression.channel_groups import ChannelGroup, Member
from medlite.types import Batch, DataSpec


def squared_weight(weight: Tensor) -> Tensor:
    """The importance of a weight's elements by their size."""
    return weight.detach().square()


def first_order_change(weight: Tensor) -> Tensor:
    """What the loss would change if an element became zero, to first order.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", arXiv:1906.10771,
    equation 8, without the square. Needs gradients (`accumulate_gradients`).
    """
    return (weight.detach() * cast("Tensor", weight.grad)).abs()


def score_units(
    group: ChannelGroup, weights: Mapping[str, Tensor], score: Callable[[Tensor], Tensor]
) -> Tensor:
    """The importance (U,) of a group's units: the mean over the weights that hold them.

    Each weight's scores are taken relative to their own mean, so that all count alike. Biases
    are left out.

    Args:
        group: U interchangeable units.
        weights: the net's parameters by name.
        score: a weight -> the importance of each of its elements, same shape.
    """
    scores = [
        _score_member(member, score(weights[member.name])) for member in group.members
        if _counts(member, weights)
    ]  # fmt: skip
    return torch.stack(scores).mean(0) if scores else torch.zeros(group.num_units)


def accumulate_gradients(net: nn.Module, batches: Iterable[Batch], spec: DataSpec) -> None:
    """Add the gradient of the loss over all batches to every parameter's `grad`."""
    for batch in batches:
        net.train().eval()  # drops what attention layers cached of the last batch's graph
        _task_loss(net(batch.image), batch.target, spec).backward()
    for parameter in net.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _counts(member: Member, weights: Mapping[str, Tensor]) -> bool:
    return member.name in weights and not member.name.endswith("bias")


def _score_member(member: Member, elements: Tensor) -> Tensor:
    by_index = elements.movedim(member.axis, 0).flatten(1).sum(1) if elements.ndim > 1 else elements
    scores = by_index.cpu()[member.indices].sum(1)
    return scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny)


def _task_loss(logits: Tensor, target: Tensor, spec: DataSpec) -> Tensor:
    if spec.labels == "multiclass":
        return F.cross_entropy(logits, target)
    return F.binary_cross_entropy_with_logits(logits, target.view_as(logits).float())
