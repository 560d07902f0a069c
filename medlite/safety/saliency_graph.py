"""A network as a graph through which gradients flow, and whose inner values can be seen.

Every net is traced as it is exported, so that a float network, a pruned and a quantised one are
explained by the same code. The rounding of a quantised graph has no gradient: each pair of
quantise and dequantise becomes torch's fake quantisation, which computes the same values and lets
the gradient straight through within the range (Bengio, Leonard & Courville, arXiv:1308.3432).

Shapes: B batch, C channels, H W D height width depth, T tokens.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from medlite.export.trace import deployable, trace

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten

ROUND = "quantized_decomposed.quantize_per_tensor.default"
UNROUND = "quantized_decomposed.dequantize_per_tensor.default"
CONVOLUTIONS = {
    *(aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv2d.padding, aten.conv3d.padding),
}
FOLLOWERS = {
    *(aten.batch_norm.default, aten.relu.default, aten.relu_.default, aten.relu6.default),
    *(aten.hardtanh.default, aten.hardtanh_.default, aten.gelu.default, aten.leaky_relu.default),
    *(aten.silu.default, aten.silu_.default, aten.hardswish.default, aten.hardswish_.default),
}
FUSED_ATTENTION = aten.scaled_dot_product_attention.default
SOFTMAX = {aten.softmax.int, aten._softmax.default}

TAP = "feature_map"
"""the module through which a chosen feature map passes"""


def as_graph(net: nn.Module, input_shape: tuple[int, ...]) -> GraphModule:
    """A copy of `net` in its deployed form that gradients pass, roundings included."""
    deployed = deployable(net)
    if not isinstance(deployed, GraphModule):
        traced = trace(deployed, input_shape).module(check_guards=False)
        assert isinstance(traced, GraphModule)
        deployed = traced
    _straight_through(deployed)
    return deployed


def tap_feature_map(graph: GraphModule, image: Tensor) -> GraphModule | None:
    """A copy whose deepest feature map passes the module `TAP`; None where there is no such map.

    It is the output of the last convolution among those of the least extent over one pixel, behind
    its normalisation and activation: of a classifier the last map before pooling, of a U-Net the
    bottleneck. Networks that go on in tokens after their only map (vision transformers) have none.

    Args:
        graph: see `as_graph`.
        image: (1, C, H, W[, D]).
    """
    extents = {
        name: math.prod(value.shape[2:])
        for name, value in _values(graph, image, lambda node: node.target in CONVOLUTIONS).items()
        if value.dim() >= 4 and math.prod(value.shape[2:]) > 1
    }
    if not extents or _goes_on_in_tokens(graph, list(extents)):
        return None
    least = min(extents.values())
    chosen = [name for name, extent in extents.items() if extent == least][-1]
    tapped = copy.deepcopy(graph)
    tapped.add_module(TAP, nn.Identity())
    node = _activated(next(each for each in tapped.graph.nodes if each.name == chosen))
    with tapped.graph.inserting_after(node):
        seen = tapped.graph.call_module(TAP, (node,))
    node.replace_all_uses_with(seen, delete_user_cb=lambda user: user is not seen)
    tapped.recompile()
    return tapped


def attention_maps(graph: GraphModule, image: Tensor) -> list[Tensor]:
    """The attention of every layer over all its tokens, averaged over heads, (T, T) each.

    Args:
        graph: see `as_graph`.
        image: (1, C, H, W[, D]).
    """
    nodes = [node for node in graph.graph.nodes if _is_attention(node)]
    wanted = {
        each.name
        for node in nodes
        for each in (node.args[:2] if node.target == FUSED_ATTENTION else [node])
    }
    values = _values(graph, image, lambda node: node.name in wanted)
    maps = []
    for node in nodes:
        if node.target == FUSED_ATTENTION:
            query, key = (values[each.name] for each in node.args[:2])
            scale = node.kwargs.get("scale") or query.shape[-1] ** -0.5
            weights = (query @ key.transpose(-1, -2) * scale).softmax(-1)
        else:
            weights = values[node.name]
        if weights.dim() == 4 and len(weights) == 1 and weights.shape[-1] == weights.shape[-2]:
            maps.append(weights[0].mean(0))
    return maps


def redrawn(graph: GraphModule, seed: int) -> GraphModule:
    """A copy with the values of every weight in another order: the same sizes, nothing learnt.

    The integers of a quantised graph are weights too; they are buffers there.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = copy.deepcopy(graph)
    with torch.no_grad():
        integers = (each for each in shuffled.buffers() if each.dtype == torch.int8)
        for weight in (*shuffled.parameters(), *integers):
            order = torch.randperm(weight.numel(), generator=generator)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return shuffled


def _straight_through(graph: GraphModule) -> None:
    for node in list(graph.graph.nodes):
        rounded = node.args[0] if str(node.target) == UNROUND else None
        if not isinstance(rounded, Node) or str(rounded.target) != ROUND:
            continue
        value, scale, zero_point, least, largest = rounded.args[:5]
        with graph.graph.inserting_before(node):
            soft = graph.graph.call_function(
                torch.fake_quantize_per_tensor_affine, (value, scale, zero_point, least, largest)
            )
        node.replace_all_uses_with(soft)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _activated(node: Node) -> Node:
    """The last of a convolution, the normalisation and the activation that follow it alone."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in FOLLOWERS or user.args[0] is not node:
            break
        node = user
    return node


def _is_attention(node: Node) -> bool:
    return node.op == "call_function" and node.target in {FUSED_ATTENTION, *SOFTMAX}


def _goes_on_in_tokens(graph: GraphModule, maps: list[str]) -> bool:
    """Whether attention follows, and no map after it."""
    names = [node.name for node in graph.graph.nodes]
    attention = [node.name for node in graph.graph.nodes if _is_attention(node)]
    return bool(attention) and names.index(maps[-1]) < names.index(attention[0])


class _Recorder(Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, graph: GraphModule, is_wanted: Callable[[Node], bool]) -> None:
        super().__init__(graph)
        self.values: dict[str, Tensor] = {}
        self._is_wanted = is_wanted

    def run_node(self, n: Node) -> Any:
        """As the interpreter does, and remembers."""
        value = super().run_node(n)
        if self._is_wanted(n):
            self.values[n.name] = value
        return value


@torch.no_grad()
def _values(
    graph: GraphModule, image: Tensor, is_wanted: Callable[[Node], bool]
) -> dict[str, Tensor]:
    recorder = _Recorder(graph, is_wanted)
    recorder.run(image)
    return recorder.values
