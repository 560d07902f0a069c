"""Opaque operators, replaced by what their authors say they are made of.

An operator that training, quantisation and pruning see as one node may be nothing that a runtime
knows. Its author then registers a decomposition in torch's own registry, in the module that
defines the operator, and it can be deployed anywhere:

    @torch._decomp.register_decomposition(torch.ops.mine.operator.default, type="pre_autograd")

Of the other type, "post_autograd", torch's fake tensors run the decomposition in place of the
operator whenever a size is open: each trace would take as long as the decomposed one, and the
decomposition's demands on sizes would be those of the operator.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch._decomp import get_decompositions
from torch._ops import OpOverload
from torch.export import ExportedProgram

from medlite.errors import ExportError
from medlite.export.trace import custom_operators, layer_of

REGISTRY = "pre_autograd"


def decompose(program: ExportedProgram, operators: Iterable[str]) -> ExportedProgram:
    """Replace some operators by their registered decompositions, and no others.

    What a decomposition brings carries the name of the layer that held the operator. Torch
    makes the program functional on the way (a batch normalisation is then called
    `_native_batch_norm_legit_no_training`); its other operators stay as they are. A
    decomposition may itself use opaque operators, which are then left in the result.

    Args:
        program: left as it is.
        operators: names such as "medlite::selective_scan", as `custom_operators` gives them;
            those that the program does not hold are ignored.

    Raises:
        ExportError: an operator without decomposition, with the layers that hold it.
    """
    names = set(operators)
    nodes = [node for node in program.graph.nodes if _name(node) in names]
    table = get_decompositions([node.target for node in nodes], type=REGISTRY)
    opaque = [node for node in nodes if node.target not in table]
    if opaque:
        message = (
            f"the operators {_describe(opaque)} have no decomposition; register one with "
            f'torch._decomp.register_decomposition(..., type="{REGISTRY}"), or choose a format '
            "that holds them"
        )
        raise ExportError(message)
    return program.run_decompositions(table) if nodes else program


def with_decomposition(program: ExportedProgram) -> set[str]:
    """The names of the opaque operators of `program` that could be replaced."""
    opaque = custom_operators(program)
    nodes = [node for node in program.graph.nodes if _name(node) in opaque]
    table = get_decompositions([node.target for node in nodes], type=REGISTRY)
    return {str(_name(node)) for node in nodes if node.target in table}


def _name(node: fx.Node) -> str | None:
    return node.target._schema.name if isinstance(node.target, OpOverload) else None


def _describe(nodes: Iterable[fx.Node]) -> str:
    held = sorted({f"'{_name(node)}' in layer '{layer_of(node)}'" for node in nodes})
    return "; ".join(held)
