"""The layers whose weights can be zero one by one, and which of them come first and last."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from medlite.compression.copies import evaluation_copy
from medlite.compression.graph_search import meets
from medlite.export.trace import trace


@dataclass(frozen=True, kw_only=True)
class SparseLayer:
    """A linear or convolutional layer (any dimensions, transposed, grouped), or several in one.

    paths: all places of the weight in the net; the first names it. input_axis: the axis of
    the weight that runs over input channels. num_inputs: channels that one output reads.
    """

    paths: tuple[str, ...]
    input_axis: int
    num_inputs: int


def find_layers(net: nn.Module) -> dict[str, SparseLayer]:
    """All layers of `net` with a weight of their own, by path.

    Not those whose weight another kind of module reads too, as an embedding may, nor those that
    compute it (weight normalisation).
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((path, module, leaf))
    return {
        places[0][0]: _layer(places[0][1], tuple(path for path, _, _ in places))
        for places in owners.values()
        if all(leaf == "weight" and _has_inputs(module) for _, module, leaf in places)
    }


def find_ends(
    net: nn.Module, layers: dict[str, SparseLayer], input_shape: tuple[int, ...]
) -> tuple[set[str], set[str]]:
    """Which layers see the image itself, and behind which there is no other layer.

    Args:
        net: in any mode.
        layers: as `find_layers` gives them.
        input_shape: (C, H, W[, D]).
    """
    program = trace(evaluation_copy(net), input_shape)
    names = {id(net.get_submodule(name).weight): name for name in layers}
    weights = {
        placeholder: names[id(net.get_parameter(parameter))]
        for placeholder, parameter in program.graph_signature.inputs_to_parameters.items()
        if id(net.get_parameter(parameter)) in names
    }
    images = set(program.graph_signature.user_inputs)
    uses = _find_uses(program.graph, weights, images)
    first = {name for node in uses for name in uses[node] if not meets(node, uses, "before")}
    last = {name for node in uses for name in uses[node] if not meets(node, uses, "behind")}
    return first, last


def _has_inputs(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _ConvNd)


def _layer(module: nn.Module, paths: tuple[str, ...]) -> SparseLayer:
    weight = module.get_parameter("weight")
    if isinstance(module, _ConvNd) and module.transposed:
        num_inputs = weight.shape[0] // module.groups
        return SparseLayer(paths=paths, input_axis=0, num_inputs=num_inputs)
    return SparseLayer(paths=paths, input_axis=1, num_inputs=weight.shape[1])


def _find_uses(
    graph: fx.Graph, weights: dict[str, str], images: set[object]
) -> dict[fx.Node, set[str]]:
    """The nodes where something made of the image meets weights, and the names of these."""
    from_weights: dict[fx.Node, set[str]] = {}
    from_image: set[fx.Node] = set()
    uses: dict[fx.Node, set[str]] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes
        held = {name for source in sources for name in from_weights.get(source, ())}
        if node.name in weights:
            from_weights[node] = {weights[node.name]}
        elif node.name in images or not from_image.isdisjoint(sources):
            from_image.add(node)
            if held and node.op != "output":
                uses[node] = held
        elif held:
            from_weights[node] = held
    return uses
