"""A graph as plain values, for steps whose structure cannot be made again from its options.

The record holds what the graph computes and the shapes of its tensors; the tensors themselves are
its state dict. It names operators of torch and of medlite only, so that reading one back can run
nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from medlite.errors import ExportError

Record = dict[str, Any]

PLAIN = (str, int, float, bool, type(None))
CONSTANTS = (torch.dtype, torch.memory_format, torch.layout)
"""written as the name under which torch has them"""


def record_graph(graph: GraphModule) -> Record:
    """All of a graph but its weights, in values that torch's safe loader takes.

    Args:
        graph: of one output, calling operators only, not modules.

    Raises:
        ExportError: it holds something that is neither an operator nor a plain value.
    """
    nodes = [_node_record(node) for node in graph.graph.nodes]
    names = dict.fromkeys(str(n.target) for n in graph.graph.nodes if n.op == "get_attr")
    return {"nodes": nodes, "tensors": {name: _tensor_record(graph, name) for name in names}}


def rebuild_graph(record: Record) -> GraphModule:
    """The graph of a record; its tensors are zeros until a state dict is loaded."""
    root = nn.Module()
    for name, tensor in record["tensors"].items():
        _set_tensor(root, name, tensor)
    graph = Graph()
    made: dict[str, Node] = {}
    for node in record["nodes"]:
        made[node["name"]] = graph.create_node(
            node["op"],
            _target(node["op"], node["target"]),
            tuple(_from_plain(value, made) for value in node["args"]),
            {key: _from_plain(value, made) for key, value in node["kwargs"].items()},
            name=node["name"],
        )
    return GraphModule(root, graph).eval()


def _node_record(node: Node) -> Record:
    return {
        "op": node.op,
        "name": node.name,
        "target": _target_name(node),
        "args": [_to_plain(value) for value in _arguments(node)],
        "kwargs": {key: _to_plain(value) for key, value in node.kwargs.items()},
    }


def _arguments(node: Node) -> tuple[Any, ...]:
    """An exported graph keeps its one output in a tuple; here it is given bare."""
    if node.op == "output" and isinstance(node.args[0], tuple | list):
        return tuple(node.args[0])
    return node.args


def _target_name(node: Node) -> str:
    if node.op != "call_function":
        if node.op == "call_module":
            message = f"a quantised graph cannot be recorded with the module '{node.target}' in it"
            raise ExportError(message)
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return f"torch.ops.{node.target}"
    name = getattr(node.target, "__name__", "")
    if getattr(operator, name, None) is not node.target:
        message = f"a quantised graph cannot be recorded with '{node.target}' in it"
        raise ExportError(message)
    return f"operator.{name}"


def _target(op: str, name: str) -> str | Callable[..., Any]:
    if op != "call_function":
        return name
    room, *path = name.removeprefix("torch.").split(".")
    found: Any = {"ops": torch.ops, "operator": operator}[room]
    for part in path:
        found = getattr(found, part)
    return found


def _to_plain(value: Any) -> Any:
    """Nodes, torch's constants and containers as {kind: value}; lists and plain values bare."""
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, CONSTANTS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [_to_plain(item) for item in value]}
    if isinstance(value, list):
        return [_to_plain(item) for item in value]
    message = f"a quantised graph cannot be recorded with the value {value!r} in it"
    raise ExportError(message)


def _from_plain(value: Any, made: Mapping[str, Node]) -> Any:
    if isinstance(value, list):
        return [_from_plain(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return made[content]
    if kind == "tuple":
        return tuple(_from_plain(item, made) for item in content)
    return torch.device(content) if kind == "device" else getattr(torch, content)


def _tensor_record(graph: GraphModule, name: str) -> Record:
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(graph.get_submodule(owner), attribute)
    if not isinstance(tensor, Tensor):
        message = f"a quantised graph cannot be recorded with the graph '{name}' inside it"
        raise ExportError(message)
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "is_parameter": isinstance(tensor, nn.Parameter),
    }


def _set_tensor(root: nn.Module, name: str, record: Record) -> None:
    *path, attribute = name.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    tensor = torch.zeros(record["shape"], dtype=getattr(torch, record["dtype"]))
    if record["is_parameter"]:
        owner.register_parameter(attribute, nn.Parameter(tensor))
    else:
        owner.register_buffer(attribute, tensor)
