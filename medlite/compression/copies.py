"""Copies of nets for compression to work on."""

from __future__ import annotations

import copy

from torch import nn


def evaluation_copy(net: nn.Module) -> nn.Module:
    """A copy of `net` on the CPU in evaluation mode; `net` itself keeps its mode.

    It goes through training mode first because timm's attention layers cache tensors in
    evaluation mode that belong to a graph, and those can neither be copied nor be trained.
    """
    was_training = net.training
    net.train().train(was_training)
    return copy.deepcopy(net).cpu().eval()


def freeze_like(net: nn.Module, original: nn.Module) -> None:
    """Train those parameters of `net` that `original` trains, by name, and those that it lacks."""
    is_trained = {name: parameter.requires_grad for name, parameter in original.named_parameters()}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(is_trained.get(name, True))
