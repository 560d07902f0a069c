"""An exported graph whose layers compute in half precision, by casts where the precision changes.

The graph runs once, on zeros, and is edited on the way: what type a tensor has is then seen and
not deduced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from medlite.compression.quantizer import WEIGHTED

aten = torch.ops.aten

PRODUCTS = WEIGHTED | {
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
}
"""operators that compute in half precision whatever they are given"""

SENSITIVE = {
    aten.softmax.int,
    aten.log_softmax.int,
    aten.scaled_dot_product_attention.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.instance_norm.default,
    aten.batch_norm.default,
    aten.rms_norm.default,
    aten.linalg_vector_norm.default,
    aten.mean.default,
    aten.mean.dim,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.cumsum.default,
    aten.var.correction,
    aten.std.correction,
    aten.exp.default,
    aten.log.default,
    aten.softplus.default,
    aten.pow.Tensor_Scalar,
    aten.rsqrt.default,
    aten.reciprocal.default,
}
"""operators that compute in float32 whatever they are given, as do our own, the scans"""

OWN_NAMESPACE = "medlite"

CAST = aten.to.dtype

ASKED_FOR = {CAST, aten._to_copy.default, aten.type_as.default}
"""casts that the network itself wants, and gets"""


@torch.no_grad()
def cast_to_half(
    graph: GraphModule, input_shape: tuple[int, ...], dtype: torch.dtype
) -> GraphModule:
    """Put casts into `graph`, and halve the tensors of its state that layers read.

    Args:
        graph: (B, C, H, W[, D]) float32 -> logits; of no use afterwards.
        input_shape: (C, H, W[, D]) of one sample.
        dtype: float16 or bfloat16.

    Returns:
        The edited graph, float32 in and out; `train()` and `eval()` change nothing in it.
    """
    _halve_state(graph, dtype)
    _Caster(graph, dtype).run(torch.zeros(2, *input_shape))
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    # a fresh module, because exported ones refuse train() and eval()
    return GraphModule(graph, graph.graph).eval().requires_grad_(False)


class _Caster(Interpreter):
    """Runs a graph node by node, and puts casts before and behind nodes as it meets them."""

    def __init__(self, graph: GraphModule, dtype: torch.dtype) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.dtype = dtype
        self._exact_forms: dict[Node, Node] = {}
        """a cast to half precision -> the float32 tensor that it rounds"""

    def run_node(self, n: Node) -> Any:
        """Cast what `n` reads, run it, and cast what it gives."""
        if n.op == "output":
            self._cast_inputs(n, torch.float32)
        if n.op != "call_function" or n in self.env:
            result = super().run_node(n)
            if n.op == "placeholder":
                self.env[n] = result
                self._insert_behind(n, result)
            return result
        was_half = self.dtype in self._types_read(n)
        wanted = self._wanted(n)
        if wanted is not None:
            self._cast_inputs(n, wanted)
        result = super().run_node(n)
        if was_half and _is_float(result) and n.target not in ASKED_FOR:
            self.env[n] = result
            self._insert_behind(n, result)
        return result

    def _wanted(self, node: Node) -> torch.dtype | None:
        """The type that `node` has to read, None where it takes what it is given."""
        if node.target in PRODUCTS:
            return self.dtype
        if _is_sensitive(node):
            return torch.float32
        types = self._types_read(node)
        if len(types) < 2 or node.target in ASKED_FOR:
            return None
        # one that writes into its first input must find it as it is
        return self.env[node.all_input_nodes[0]].dtype if _writes(node) else self.dtype

    def _types_read(self, node: Node) -> set[torch.dtype]:
        values = (self.env[source] for source in node.all_input_nodes)
        return {value.dtype for value in _tensors(values) if value.is_floating_point()}

    def _cast_inputs(self, node: Node, dtype: torch.dtype) -> None:
        def cast(source: Node) -> Node:
            value = self.env[source]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return source
            if value.dtype == dtype:
                return source
            if dtype == torch.float32 and source in self._exact_forms:
                return self._exact_forms[source]
            with self.graph.inserting_before(node):
                made = self.graph.call_function(CAST, (source, dtype))
            return self._keep(made, source, value.to(dtype))

        node.args = map_arg(node.args, cast)
        node.kwargs = map_arg(node.kwargs, cast)

    def _insert_behind(self, node: Node, result: Tensor) -> None:
        """Hand a float32 result on in half precision."""
        if result.dtype == self.dtype:
            return
        readers = list(node.users)
        with self.graph.inserting_after(node):
            made = self.graph.call_function(CAST, (node, self.dtype))
        self._keep(made, node, result.to(self.dtype))
        self._exact_forms[made] = node
        for reader in readers:
            reader.replace_input_with(node, made)

    def _keep(self, made: Node, source: Node, value: Tensor) -> Node:
        made.meta = {key: of for key, of in source.meta.items() if key == "nn_module_stack"}
        self.env[made] = value
        return made


def _halve_state(graph: GraphModule, dtype: torch.dtype) -> None:
    """Cast the tensors that any operator but a sensitive one reads."""
    readers: dict[str, list[Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(node.users)
    for name, users in readers.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = graph.get_submodule(owner_name)
        tensor = getattr(owner, attribute)
        if not _is_float(tensor) or all(map(_is_sensitive, users)):
            continue
        if isinstance(tensor, nn.Parameter):
            setattr(owner, attribute, nn.Parameter(tensor.to(dtype), requires_grad=False))
        else:
            setattr(owner, attribute, tensor.to(dtype))


def _is_sensitive(node: Node) -> bool:
    namespace = getattr(node.target, "namespace", "")
    return node.target in SENSITIVE or namespace == OWN_NAMESPACE


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
