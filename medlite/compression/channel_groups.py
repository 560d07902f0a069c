"""Which channels of a net can only be removed together, found by torch-pruning.

torch-pruning (Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900) follows
autograd's graph. What it cannot follow is hidden from it by stand-ins that are in the net only
while it is traced (`medlite.compression.stand_ins`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from medlite.compression.stand_ins import (
    LAYERS,
    Opaque,
    hide_activations,
    hide_gates,
    hide_mixers,
    output_layers,
)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that go together, counted in the layer that makes them."""

    root: nn.Module
    num_channels: int
    num_parts: int
    """parts of the channels, one after another, that must stay equally large (group
    normalisation, grouped convolutions)"""
    members: Any
    """torch-pruning's own group, for its measures of importance"""


class ChannelGraph:
    """The channel groups of a net, and their removal.

    Args:
        net: pruned in place by `remove`.
        images: (B, C, H, W[, D]) to trace it with.
    """

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        self._net, self._images = net.eval(), images
        self._expected_shape = self._output_shape()
        self._graph = torch_pruning.DependencyGraph()
        with hide_activations(net), hide_mixers(net):
            self._outputs = output_layers(net, images)
            with hide_gates(net, keep=self._outputs) as with_gates:
                self._graph.build_dependency(
                    net,
                    example_inputs=images,
                    output_transform=with_gates,
                    customized_pruners={Opaque: _OpaquePruner()},
                    verbose=False,
                )

    def groups(self) -> list[ChannelGroup]:
        """All groups that touch neither the net's outputs nor a layer that must keep its size."""
        found = self._graph.get_all_groups(ignored_layers=self._outputs, root_module_types=LAYERS)
        return [group for group in map(_describe, found) if group is not None]

    def remove(self, group: ChannelGroup, channels: list[int]) -> bool:
        """Remove the channels of those numbers from every member of the group.

        Returns:
            Whether the net still runs, to the same shape of output; if not, it is as it was.
        """
        tensors_and_sizes = [_contents(module) for module in self._net.modules()]
        pruner = self._graph.get_pruner_of_module(group.root)
        try:
            self._graph.get_pruning_group(group.root, pruner.prune_out_channels, channels).prune()
            if self._output_shape() == self._expected_shape:
                return True
        except (RuntimeError, ValueError, IndexError, AssertionError):
            pass  # the net itself says that tracing misread it
        for module, contents in zip(self._net.modules(), tensors_and_sizes, strict=True):
            vars(module).update(contents)
        return False

    @torch.no_grad()
    def _output_shape(self) -> torch.Size:
        return self._net(self._images).shape


class _OpaquePruner(torch_pruning.pruner.function.BasePruningFunc):
    """Tells torch-pruning how wide a stand-in is; groups that hold one are never pruned."""

    def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        return layer

    def get_out_channels(self, layer: Opaque) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: Opaque) -> int:
        return layer.in_channels


def _describe(group: Any) -> ChannelGroup | None:
    """The group in our words; None where it cannot be pruned safely."""
    members = [(item.dep.target.module, list(item.idxs)) for item in group.items]
    if any(isinstance(module, Opaque) for module, _ in members):
        return None
    root, channels = members[0]
    num_parts = 1
    for module, own_channels in members:
        parts = _num_parts(module)
        if parts > 1 and own_channels != channels:
            return None
        num_parts = math.lcm(num_parts, parts)
    return ChannelGroup(root, len(channels), num_parts, group)


def _num_parts(module: Any) -> int:
    """Equal parts into which a module cuts the channels that it reads; depth-wise ones do not."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    groups = getattr(module, "groups", 1)
    return 1 if groups == getattr(module, "in_channels", None) else groups


def _contents(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, with copies of its tables of tensors (not of the tensors)."""
    contents = dict(vars(module))
    return contents | {key: dict(contents[key]) for key in ("_parameters", "_buffers")}
