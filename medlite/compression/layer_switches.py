"""One prepared graph in which the rounding of single layers can be switched off and on.

Searches over precisions ask the same question of many sets of layers. Here each answer costs one
run of the graph: nothing is exported, prepared or calibrated again.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer

from medlite.compression.fake_quantize import fake_quantizers
from medlite.compression.quantized_graph import prepare
from medlite.compression.quantizer import ANNOTATION, Int8Quantizer

BuildQuantizer = Callable[[Collection[str]], Int8Quantizer]
"""whole paths of layers to keep in float -> what to round"""


class LayerSwitches:
    """A prepared graph and, for any set of layers, which of its rounding modules they need.

    A tensor is rounded if a layer of the set reads or writes it, or an operator that runs on
    integers because of them (pooling, residual sums), as `Int8Quantizer` decides. In one thing
    a graph that is prepared for the set alone may round less: where a float layer's output is
    read by a layer of the set and by others, here all of them read it rounded.

    Args:
        net: (B, C, H, W[, D]) -> logits; left as it is.
        input_shape: (C, H, W[, D]) of one sample.
        build_quantizer: given no layer to keep in float, says which can be rounded.
    """

    def __init__(
        self, net: nn.Module, input_shape: tuple[int, ...], build_quantizer: BuildQuantizer
    ) -> None:
        self._build_quantizer = build_quantizer
        quantizer = build_quantizer(())
        recorder = _Recorder(quantizer)
        self.prepared = prepare(net, input_shape, cast("Int8Quantizer", recorder))
        self._unmarked = recorder.unmarked
        self.layers = quantizer.quantized_layers
        self.float_layers = quantizer.float_layers
        self._tensors = _tensors_of_parts(self.prepared)

    @contextmanager
    def rounding_only(self, layers: Collection[str]) -> Iterator[GraphModule]:
        """The graph, in which only these of `self.layers` are rounded; put it in "apply" mode."""
        rounded = self._rounded_tensors(layers)
        idle = [part for part, tensors in self._tensors.items() if not tensors & rounded]
        handles = [part.register_forward_hook(_pass_through) for part in idle]
        try:
            yield self.prepared
        finally:
            for handle in handles:
                handle.remove()

    def _rounded_tensors(self, layers: Collection[str]) -> set[str]:
        if not layers:
            return set()
        marked = _copy_of_graph(self._unmarked)
        self._build_quantizer(set(self.layers) - set(layers)).annotate(marked)
        return {
            tensor.name
            for node in marked.graph.nodes
            if ANNOTATION in node.meta
            for tensor in _annotated_tensors(node)
        }


class _Recorder(Quantizer):
    """A quantiser that keeps a copy of the graph as it was before the marks."""

    unmarked: GraphModule

    def __init__(self, quantizer: Int8Quantizer) -> None:
        self._quantizer = quantizer

    def annotate(self, model: GraphModule) -> GraphModule:
        """Keep the graph, then mark it."""
        self.unmarked = _copy_of_graph(model)
        return self._quantizer.annotate(model)

    def validate(self, model: GraphModule) -> None:
        """As the quantiser does."""
        self._quantizer.validate(model)


def _copy_of_graph(model: GraphModule) -> GraphModule:
    """A graph of its own, around the same tensors."""
    return GraphModule(model, copy.deepcopy(model.graph))


def _tensors_of_parts(prepared: GraphModule) -> dict[nn.Module, set[str]]:
    """For each rounding module the names of the tensors (nodes) that it rounds."""
    parts = set(fake_quantizers(prepared).values())
    tensors: dict[nn.Module, set[str]] = defaultdict(set)
    for node in prepared.graph.nodes:
        if node.op == "call_module":
            part = prepared.get_submodule(str(node.target))
            if part in parts:
                tensors[part].add(node.args[0].name)
    return dict(tensors)


def _annotated_tensors(node: Node) -> list[Node]:
    annotation: Any = node.meta[ANNOTATION]
    outputs = [node] if annotation.output_qspec is not None else []
    return [*annotation.input_qspec_map, *outputs]


def _pass_through(_part: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    return inputs[0]
