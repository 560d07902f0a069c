"""How much each unit of a group of channels matters, by the criteria of torch-pruning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch_pruning.dependency import Dependency, Group, Node

from medlite.compression.channel_groups import ChannelGroup, Member
from medlite.types import Batch, DataSpec

IMPORTANCES = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
    "bn_scale": partial(torch_pruning.importance.GroupMagnitudeImportance, p=1),
    "hessian": torch_pruning.importance.GroupHessianImportance,
    "random": lambda normalizer: torch_pruning.importance.RandomImportance(),
}
"""Criteria by name. "taylor": what the cross-entropy would change if a weight became zero, to
first order (after Molchanov et al., "Importance Estimation for Neural Network Pruning",
arXiv:1906.10771, who square it batch by batch; here the gradient is summed over all batches
first, as torch-pruning does); "magnitude": the square of a weight, which summed over all weights
of a unit is the group norm of DepGraph (arXiv:2301.12900, section 3.3); "bn_scale": the size of
the scales of batch normalisation, nothing else (Liu et al., "Learning Efficient Convolutional
Networks through Network Slimming", arXiv:1708.06519), without their sparse training; "hessian":
the change of the cross-entropy to second order (LeCun et al., "Optimal Brain Damage", NIPS 1989),
where the diagonal of the Hessian is the diagonal empirical Fisher, the mean square of the
gradients of single images;
"random": a control."""


def scored_weights(net: nn.Module, importance: str) -> dict[str, Tensor]:
    """The parameters by name that a criterion looks at; biases are left out."""
    weights: dict[str, Tensor] = {n: p for n, p in net.named_parameters() if not n.endswith("bias")}
    if importance != "bn_scale":
        return weights
    norms = [n for n, module in net.named_modules() if isinstance(module, _BatchNorm)]
    return {f"{n}.weight": weights[f"{n}.weight"] for n in norms if f"{n}.weight" in weights}


def score_units(group: ChannelGroup, weights: Mapping[str, Tensor], importance: str) -> Tensor:
    """The importance (U,) of a group's units: the mean over the weights that hold them.

    Args:
        group: U interchangeable units.
        weights: the net's `scored_weights`, with what `accumulate_evidence` gave them.
        importance: one of `IMPORTANCES`. Biases are left out.
    """
    scored = [m for m in group.members if m.name in weights and not m.name.endswith("bias")]
    if not scored:
        return torch.zeros(group.num_units)
    criterion = IMPORTANCES[importance](normalizer=None)  # which is only for comparing groups
    return criterion(_as_linear_layers(group, scored, weights))


def accumulate_evidence(
    net: nn.Module, batches: Iterable[Batch], spec: DataSpec, importance: str
) -> None:
    """Give every parameter, as `grad`, what "taylor" or "hessian" need of training data."""
    if importance == "taylor":
        accumulate_gradients(net, batches, spec)
    elif importance == "hessian":
        accumulate_fisher(net, batches, spec)


def accumulate_gradients(net: nn.Module, batches: Iterable[Batch], spec: DataSpec) -> None:
    """Add the gradient of the loss over all batches to every parameter's `grad`."""
    for batch in batches:
        _backward(net, batch, spec)
    for parameter in net.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def accumulate_fisher(net: nn.Module, batches: Iterable[Batch], spec: DataSpec) -> None:
    """Make every parameter's `grad` the mean over all images of its squared gradient.

    That is the diagonal of the empirical Fisher information (the targets are those of the data,
    not drawn from the net), by one backward pass an image.
    """
    parameters, num_images = list(net.parameters()), 0
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        for image in zip(*(part.split(1) for part in batch), strict=True):
            net.zero_grad()
            _backward(net, Batch(*image), spec)
            num_images += 1
            for total, parameter in zip(totals, parameters, strict=True):
                if parameter.grad is not None:
                    total.add_(parameter.grad.square())
    for total, parameter in zip(totals, parameters, strict=True):
        parameter.grad = total / max(1, num_images)


def _backward(net: nn.Module, batch: Batch, spec: DataSpec) -> None:
    net.train().eval()  # drops what attention layers cached of the last batch's graph
    _task_loss(net(batch.image), batch.target, spec).backward()


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
