"""The classes of a net's channels, found by following its operators."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from medlite.compression.channel_calls import Call, keep_all
from medlite.compression.channel_labels import ChannelClasses, Labels
from medlite.compression.channel_rules import follow
from medlite.compression.copies import evaluation_copy
from medlite.export.trace import trace

Place = tuple[str, int]
"""An axis of a weight: its name in the net, and the axis."""


def label_channels(net: nn.Module, images: Tensor) -> dict[Place, Tensor]:
    """The class of each index of each axis of a net's weights and buffers that is longer than 1.

    Args:
        net: in evaluation mode.
        images: (B, C, H, W[, D]); only their shape is read.
    """
    graph = trace(evaluation_copy(net), tuple(images.shape[1:])).module(check_guards=False)
    tracer = _Tracer(graph.to("meta"), net)
    tracer.run(images.to("meta"))
    return dict(tracer.classes_of_weights())


def named_weights(net: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers, a tensor with several names once for each of them."""
    parameters = net.named_parameters(remove_duplicate=False)
    return [*parameters, *net.named_buffers(remove_duplicate=False)]


class _Tracer(fx.Interpreter):
    """Runs a graph on tensors without data, and beside it the labels of all its tensors."""

    def __init__(self, graph: fx.GraphModule, net: nn.Module) -> None:
        super().__init__(graph)
        self._classes = ChannelClasses()
        self._labels: dict[fx.Node, Any] = {}
        self._first_names: dict[int, str] = {}
        self._weights: dict[str, Labels] = {}
        for name, tensor in named_weights(net):
            first = self._first_names.setdefault(id(tensor), name)
            new = first == name
            self._weights[name] = self._classes.new(tensor.shape) if new else self._weights[first]

    def classes_of_weights(self) -> Iterator[tuple[Place, Tensor]]:
        """The classes along each axis of each weight, under its first name."""
        for name in self._first_names.values():
            for axis, labels in self._weights[name].along.items():
                yield (name, axis), self._classes.roots(labels)

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        """The node's value; its labels are kept."""
        value = super().run_node(n)
        if n.op == "get_attr" and str(n.target) in self._weights:
            self._labels[n] = self._weights[str(n.target)]
        elif n.op == "output":
            keep_all(self._call(n, torch.empty(0)))
        elif n.target is operator.getitem:
            source, place = cast("tuple[fx.Node, int]", n.args)
            self._labels[n] = self._labels[source][place]
        elif n.op == "call_function" and isinstance(value, Tensor | tuple | list):
            self._labels[n] = follow(self._call(n, value))
        elif isinstance(value, Tensor):
            self._labels[n] = Labels(tuple(value.shape))
        return value

    def _call(self, n: fx.Node, result: Any) -> Call:
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), self._labelled)
        return Call(self._classes, n.target, args, kwargs, result)

    def _labelled(self, node: fx.Node) -> Any:
        return self._labels[node] if node in self._labels else self.env[node]
