"""How much each unit of a group of channels matters, by the criteria of torch-pruning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torch_pruning.dependency import Dependency, Group, Node

from medlite.compression.channel_groups import ChannelGroup, Member
from medlite.types import Batch, DataSpec

IMPORTANCES = {
    "taylor": torch_pruning.importance.GroupTaylorImportance,
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
}
"""Criteria by name. "taylor": what the loss would change if a weight became zero, to first order
(Molchanov et al., "Importance Estimation for Neural Network Pruning", arXiv:1906.10771), from
gradients; "magnitude": the square of a weight."""


def score_units(group: ChannelGroup, weights: Mapping[str, Tensor], importance: str) -> Tensor:
    """The importance (U,) of a group's units: the mean over the weights that hold them.

    Args:
        group: U interchangeable units.
        weights: the net's parameters by name, with gradients for "taylor".
        importance: one of `IMPORTANCES`. Biases are left out.
    """
    scored = [m for m in group.members if m.name in weights and not m.name.endswith("bias")]
    if not scored:
        return torch.zeros(group.num_units)
    criterion = IMPORTANCES[importance](normalizer=None)  # which is only for comparing groups
    return criterion(_as_linear_layers(group, scored, weights))


def accumulate_gradients(net: nn.Module, batches: Iterable[Batch], spec: DataSpec) -> None:
    """Add the gradient of the loss over all batches to every parameter's `grad`."""
    for batch in batches:
        net.train().eval()  # drops what attention layers cached of the last batch's graph
        _task_loss(net(batch.image), batch.target, spec).backward()
    for parameter in net.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _as_linear_layers(
    group: ChannelGroup, members: Iterable[Member], weights: Mapping[str, Tensor]
) -> Group:
    """A group as torch-pruning sees it: members are linear layers with an output a unit.

    So its criteria score any axis of any weight, and units of several channels.
    """
    units, prune = list(range(group.num_units)), torch_pruning.prune_linear_out_channels
    layers = Group()
    for member in members:
        node = Node(_as_linear(member, weights[member.name]), None)
        layers.add_dep(Dependency(prune, prune, node, node), units)
        layers[-1].root_idxs = units
    return layers


def _as_linear(member: Member, weight: Tensor) -> nn.Linear:
    def rows(tensor: Tensor) -> Tensor:
        return tensor.detach().movedim(member.axis, 0)[member.indices].flatten(1)

    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(rows(weight))
    layer.weight.grad = None if weight.grad is None else rows(weight.grad)
    return layer


def _task_loss(logits: Tensor, target: Tensor, spec: DataSpec) -> Tensor:
    if spec.labels == "multiclass":
        return F.cross_entropy(logits, target)
    return F.binary_cross_entropy_with_logits(logits, target.view_as(logits).float())
