"""Batch normalisation of an exported graph as the multiplication and addition that it is."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def replace_batch_norms(graph: GraphModule) -> None:
    """Write every batch normalisation as x scale + shift, with its running statistics, in place.

    For those that are not folded into a layer because they follow none. While one is left,
    torchao's conversion exports 96 patterns to look for it, which takes some 20 seconds.
    """
    for node in list(graph.graph.nodes):
        if node.target == aten.batch_norm.default:
            _replace(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _replace(graph: GraphModule, node: Node) -> None:
    values, weight, bias, mean, variance, _, _, epsilon = cast("tuple[Any, ...]", node.args[:8])
    scale = (_tensor(graph, variance) + epsilon).rsqrt()
    if weight is not None:
        scale = scale * _tensor(graph, weight)
    shift = -_tensor(graph, mean) * scale
    if bias is not None:
        shift = shift + _tensor(graph, bias)
    shape = (-1, *[1] * (node.meta["val"].ndim - 2))
    for name, tensor in (("scale", scale), ("shift", shift)):
        graph.register_parameter(f"{node.name}_{name}", nn.Parameter(tensor.detach().view(shape)))
    with graph.graph.inserting_before(node):
        scaled = graph.graph.call_function(
            aten.mul.Tensor, (values, graph.graph.get_attr(f"{node.name}_scale"))
        )
        shifted = graph.graph.call_function(
            aten.add.Tensor, (scaled, graph.graph.get_attr(f"{node.name}_shift"))
        )
    scaled.meta, shifted.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(shifted)
    graph.graph.erase_node(node)


def _tensor(graph: GraphModule, node: object) -> Tensor:
    assert isinstance(node, Node)
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)
