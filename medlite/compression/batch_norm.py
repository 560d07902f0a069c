"""Batch normalisation of an exported graph as the multiplication and addition that it is.

Shapes in docstrings: C channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from medlite.errors import ExportError
from medlite.export.trace import layer_of

aten = torch.ops.aten


def replace_batch_norms(graph: GraphModule) -> None:
    """Write every batch normalisation as x scale + shift, with its running statistics, in place.

    For those that are not folded into a layer. While one is left, torchao's conversion exports 96
    patterns to look for it, which takes some 20 seconds.

    Raises:
        ExportError: a batch normalisation has no running statistics.
    """
    for node in list(graph.graph.nodes):
        if node.target == aten.batch_norm.default:
            _replace(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _replace(graph: GraphModule, node: Node) -> None:
    values, weight, bias, mean, variance, uses_batch, _, epsilon = cast(
        "tuple[Any, ...]", node.args[:8]
    )
    if mean is None or uses_batch:
        message = (
            f"the batch normalisation '{layer_of(node)}' has no running statistics, so that each "
            "image's logits depend on the others of its batch; set track_running_stats=True"
        )
        raise ExportError(message)
    scale = (_tensor(graph, variance) + epsilon).rsqrt()
    if weight is not None:
        scale = scale * _tensor(graph, weight)
    shift = -_tensor(graph, mean) * scale
    if bias is not None:
        shift = shift + _tensor(graph, bias)
    with graph.graph.inserting_before(node):
        factor = _parameter(graph, node, "scale", scale, _is_trained(graph, weight))
        scaled = graph.graph.call_function(aten.mul.Tensor, (values, factor))
        term = _parameter(graph, node, "shift", shift, _is_trained(graph, bias))
        shifted = graph.graph.call_function(aten.add.Tensor, (scaled, term))
    scaled.meta, shifted.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(shifted)
    graph.graph.erase_node(node)


def _parameter(graph: GraphModule, norm: Node, kind: str, tensor: Tensor, is_trained: bool) -> Node:
    """A new parameter (C,), seen in the shape that the normalisation's output is joined with.

    A vector, because optimisers spare vectors the weight decay, as they do the net's own norms.
    """
    name, output = f"{norm.name}_{kind}", norm.meta["val"]
    parameter = nn.Parameter(tensor.detach(), requires_grad=is_trained)
    graph.register_parameter(name, parameter)
    read = graph.graph.get_attr(name)
    shape = [-1, *[1] * (output.ndim - 2)]
    seen = graph.graph.call_function(aten.view.default, (read, shape))
    # quantisers ask for the shapes of what is added
    read.meta["val"] = output.fake_mode.from_tensor(parameter, static_shapes=True)
    seen.meta["val"] = read.meta["val"].view(shape)
    return seen


def _is_trained(graph: GraphModule, node: object) -> bool:
    """Whether the normalisation has such a parameter, and it is not frozen."""
    return node is not None and _tensor(graph, node).requires_grad


def _tensor(graph: GraphModule, node: object) -> Tensor:
    assert isinstance(node, Node)
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)
