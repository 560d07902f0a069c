"""From a trained network to torch's exported program, with the batch axis left open.

Shapes in docstrings: B batch, C channels, H W D height width depth, K logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from medlite.errors import ExportError

TRACE_BATCH_SIZE = 2
"""torch specialises axes of size 1 to constants, so the example batch has two images"""

_MODULES_OF_NAMESPACES = {
    "quantized_decomposed": "torch.ao.quantization.fx._decomposed",
    "torchvision": "torchvision",
}
"""Where libraries that do not use `torch.library.custom_op` register their operators."""

_BUILT_IN_NAMESPACES = {"aten", "prim", "prims", "higher_order", None}


def deployable(net: nn.Module) -> nn.Module:
    """The form of `net` that is deployed: a copy in evaluation mode, on the CPU, re-parameterised.

    `net.deploy()` is used where the network has it. A `GraphModule` (what the pt2e quantisation
    returns) has no modes to switch; the float weights that its conversion left behind are dropped.
    """
    if isinstance(net, fx.GraphModule):
        graph_module = copy.deepcopy(net).cpu()
        _drop_unused_tensors(graph_module)
        return graph_module
    deploy = getattr(net, "deploy", None)
    deployed = deploy() if callable(deploy) else copy.deepcopy(net)
    return deployed.cpu().eval()


def trace(net: nn.Module, input_shape: tuple[int, ...]) -> ExportedProgram:
    """Export `net`, a network in its deployable form, for (B, C, H, W[, D]) float32 with any B.

    Args:
        net: as `deployable` returns it.
        input_shape: (C, H, W[, D]) of one image.

    Raises:
        ExportError: the network depends on the data or on the batch size; names the layer.
    """
    example = torch.zeros(TRACE_BATCH_SIZE, *input_shape)
    entered: list[str] = []
    try:
        with torch.no_grad(), recording_layers(net, entered):
            program = torch.export.export(
                net, (example,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False
            )
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        layer = entered[-1] if entered else "the network itself"
        message = (
            f"torch.export cannot trace the network for images of {input_shape}, in layer "
            f"'{layer}': {first_line(error)}; a layer must not branch on its data or fix the "
            "number of images in a batch"
        )
        raise ExportError(message) from error
    _remove_idle_pads(program)
    return program


def layer_of(node: fx.Node) -> str:
    """The dotted name of the innermost module that made `node`, "" where torch lost it."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name, _ in stack.values()]
    return names[-1] if names else ""


def custom_operators(program: ExportedProgram) -> set[str]:
    """Names such as "medlite::selective_scan" of the operators that torch does not bring."""
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {
        target._schema.name
        for target in targets
        if isinstance(target, torch._ops.OpOverload)
        and target.namespace not in _BUILT_IN_NAMESPACES
    }


def modules_registering(operators: set[str]) -> tuple[str, ...]:
    """The Python modules to import before a program with these operators can be loaded.

    Raises:
        ExportError: an operator whose origin cannot be found.
    """
    return tuple(sorted({_module_registering(operator) for operator in operators}))


def first_line(error: BaseException) -> str:
    """The first line that says something of a long exception."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def _module_registering(operator: str) -> str:
    namespace = operator.split("::", maxsplit=1)[0]
    if namespace in _MODULES_OF_NAMESPACES:
        return _MODULES_OF_NAMESPACES[namespace]
    definition = torch.library._maybe_get_opdef(operator)
    if definition is None:
        message = (
            f"the operator '{operator}' was not registered with torch.library.custom_op, so the "
            "module that a program on disk has to import for it is unknown"
        )
        raise ExportError(message)
    return definition._init_fn.__module__


def _remove_idle_pads(program: ExportedProgram) -> None:
    """Take out paddings by nothing, which engines would copy the whole image for."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.pad.default and not any(node.args[1]):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)


def _drop_unused_tensors(graph_module: fx.GraphModule) -> None:
    used = {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}
    named = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    for name, _ in named:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(graph_module.get_submodule(owner), attribute)


@contextmanager
def recording_layers(net: nn.Module, entered: list[str]) -> Iterator[None]:
    """Keep the names of the modules whose forward is under way in `entered`, innermost last."""
    handles = []
    for name, module in net.named_modules():
        if name:
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: entered.append(name)),
                module.register_forward_hook(lambda *_: (entered.pop(), None)[1]),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
