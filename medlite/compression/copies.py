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
