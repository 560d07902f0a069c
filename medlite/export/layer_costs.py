"""Parameters, multiply-adds and memory traffic of each layer in the form that is deployed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from medlite.export.trace import deployable, layer_of, recording_layers


@dataclass(kw_only=True)
class LayerCost:
    """What one layer costs for one image; a layer is a module without the modules in it.

    Multiply-adds and operations are those of convolutions, matrix products, attention and
    scans. Norms, activations and other element-wise work is left out of both, as the field's
    tables do, but not out of the memory traffic.
    """

    layer: str
    """dotted name; "" is what the network computes outside its layers"""
    params: int = 0
    macs: int = 0
    """multiply-adds of convolutions, matrix products and attention"""
    flops: int = 0
    """2 macs, and what scans register (9 L D N + 2 L D for a selective one)"""
    activations: int = 0
    """elements that the counted operators put out"""
    memory_access_bytes: int = 0
    """what operators read and write if nothing is fused or stays in a cache

    Ma et al., "ShuffleNet V2", arXiv 1807.11164, section 2.
    """


def count_layers(net: nn.Module, input_shape: tuple[int, ...]) -> list[LayerCost]:
    """The costs of every layer of the deployed form, in the order of the network.

    Operators are counted where torch dispatches them, so functional calls, attention and custom
    operators are seen; counters that walk over modules miss these.

    Args:
        net: counted in its deployable form; a re-parameterised network is counted fused.
        input_shape: (C, H, W[, D]) of the image.
    """
    deployed = deployable(net)
    names = dict.fromkeys(name for name, _ in deployed.named_modules())
    if isinstance(deployed, fx.GraphModule):
        names |= dict.fromkeys(layer_of(node) for node in deployed.graph.nodes)
    costs = {name: LayerCost(layer=name) for name in names}
    for layer, parameter in _weights(deployed):
        costs[layer].params += parameter.numel()
    entered: list[str] = [""]
    image = torch.zeros(1, *input_shape)
    forward = _ByLayer(deployed, entered).run if isinstance(deployed, fx.GraphModule) else deployed
    with (
        torch.no_grad(),
        _attention_as_products(),
        recording_layers(deployed, entered),
        _Counter(costs, entered),
    ):
        forward(image)
    return [cost for cost in costs.values() if cost.params or cost.memory_access_bytes]


def count_parameters(net: nn.Module) -> int:
    """Of the deployed form, which is not run for it."""
    return sum(parameter.numel() for _, parameter in _weights(deployable(net)))


def total(costs: Sequence[LayerCost]) -> LayerCost:
    """The sum over all layers."""
    names = [field.name for field in fields(LayerCost) if field.name != "layer"]
    sums = {name: sum(getattr(cost, name) for cost in costs) for name in names}
    return LayerCost(layer="total", **sums)


class _Counter(TorchDispatchMode):
    """Adds the cost of each operator to that of the innermost layer that is under way."""

    def __init__(self, costs: dict[str, LayerCost], entered: list[str]) -> None:
        super().__init__()
        self.costs, self.entered = costs, entered

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        cost = self.costs[self.entered[-1]]
        flops = _count_flops(func, args, kwargs or {}, result)
        if flops:
            cost.flops += flops
            cost.macs += 0 if func.namespace == "medlite" else flops // 2
            cost.activations += sum(t.numel() for t in _tensors(result)[:1])
        if not _moves_nothing(func):
            touched = {id(t): t.numel() * t.element_size() for t in _tensors((args, kwargs))}
            written = {id(t): t.numel() * t.element_size() for t in _tensors(result)}
            cost.memory_access_bytes += sum(touched.values()) + sum(written.values())
        return result


def _count_flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def _moves_nothing(func: Any) -> bool:
    """Whether the operator gives another view of the same memory."""
    return func.is_view or func.overloadpacket is torch.ops.aten._unsafe_view


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _attention_as_products() -> Iterator[None]:
    """Fused attention on the CPU, and torch's own transformer layers, have no formula."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


class _ByLayer(fx.Interpreter):
    """Runs a graph, whose layers are not modules any more, and says which one is under way."""

    def __init__(self, graph_module: fx.GraphModule, entered: list[str]) -> None:
        super().__init__(graph_module)
        self.entered = entered

    def run_node(self, n: fx.Node) -> Any:
        self.entered[-1] = layer_of(n)
        return super().run_node(n)


def _weights(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The layer and the values of all weights; quantised ones are buffers, `_frozen_param`."""
    if not isinstance(net, fx.GraphModule):
        yield from ((name.rpartition(".")[0], p) for name, p in net.named_parameters())
        return
    tensors: dict[str, Tensor] = dict(net.named_parameters())
    tensors |= {n: b for n, b in net.named_buffers() if n.startswith("_frozen_param")}
    for node in net.graph.nodes:
        if node.op == "get_attr" and node.target in tensors:
            yield _layer_that_uses(node), tensors.pop(node.target)


def _layer_that_uses(node: fx.Node) -> str:
    """The layer of the first operator behind `node` that belongs to one."""
    while not layer_of(node) and node.users:
        node = next(iter(node.users))
    return layer_of(node)
