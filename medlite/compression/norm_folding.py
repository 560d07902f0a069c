"""Batch normalisation that follows a layer, found in the data flow and folded into that layer.

In evaluation form it multiplies each channel by a constant and adds another, which the weights
and the bias of the convolution or linear layer before it can do as well: Jacob et al.,
arXiv:1712.05877, section 3.2.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from medlite.compression.channel_trace import named_weights
from medlite.compression.copies import evaluation_copy
from medlite.compression.quantizer import DROPOUTS, WEIGHTED, layer_name
from medlite.export.trace import layer_of, trace

aten = torch.ops.aten

RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
SWAPS = {aten.transpose.int, aten.permute.default}
COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
"""what is known to compute nothing but a normalisation (timm's: and then an activation)"""


def find_folds(
    net: nn.Module, input_shape: tuple[int, ...]
) -> tuple[dict[str, str], dict[str, str]]:
    """Which batch normalisations can be folded, by what the exported graph computes.

    Between a layer and its normalisation only reshapes, transpositions and dropouts that drop
    nothing may stand, and nothing else may read the layer's output.

    Args:
        net: in evaluation mode.
        input_shape: (C, H, W[, D]) of one image.

    Returns:
        The layer of each normalisation that can be folded, and what each of the others is that it
        stays, both by the normalisation's name and in the order of the data flow.

    Raises:
        ExportError: torch cannot export the net.
    """
    # a copy, because tracing leaves tensors without data in layers that cache some
    graph = trace(evaluation_copy(net), input_shape).module(check_guards=False).graph
    num_uses = _count_uses(graph, net)
    folds, obstacles = dict[str, str](), dict[str, str]()
    for node in graph.nodes:
        if node.target == aten.batch_norm.default:
            name = _norm_name(node)
            obstacle = next(_obstacles(node, net.get_submodule(name), net, num_uses), None)
            if obstacle is None:
                folds[name] = layer_name(_path_to_layer(node)[-1])
            else:
                obstacles[name] = obstacle
    return folds, obstacles


@torch.no_grad()
def fold_norms(net: nn.Module, folds: Mapping[str, str]) -> None:
    """Multiply normalisations into their layers, in place; all of these layers then have a bias.

    The products are computed in float64, so that each weight is rounded once.

    Args:
        net: in evaluation mode.
        folds: as `find_folds` returns them.
    """
    for norm_name, path in folds.items():
        norm, layer = cast("_BatchNorm", net.get_submodule(norm_name)), net.get_submodule(path)
        _set_tensors(layer, *_folded(layer, norm))
        _replace(net, norm)


@torch.no_grad()
def fold_structure(net: nn.Module, folds: Mapping[str, str]) -> None:
    """Give `net` the modules and the shapes that `fold_norms` leaves, in place."""
    for norm_name, path in folds.items():
        norm, layer = cast("_BatchNorm", net.get_submodule(norm_name)), net.get_submodule(path)
        _set_tensors(layer, cast("Tensor", layer.weight), cast("Tensor", norm.running_mean))
        _replace(net, norm)


def _obstacles(
    node: fx.Node, norm: nn.Module, net: nn.Module, num_uses: Mapping[int, int]
) -> Iterator[str]:
    """What keeps a normalisation from being folded; the first is the one to tell."""
    mean, uses_batch = node.args[3], node.args[5]
    if not isinstance(mean, fx.Node) or uses_batch:
        yield "without running statistics"
    if type(norm) not in KINDS:
        yield f"in {type(norm).__name__}, which is no batch normalisation of torch or timm"
    if num_uses[id(norm.running_mean)] > 1:
        yield "used more than once"
    path = _path_to_layer(node)
    if path[-1].target not in WEIGHTED:
        yield "not behind a convolution or linear layer"
    if any(len(passed.users) > 1 for passed in path):
        yield "behind a layer whose output is also read elsewhere"
    if _channel_axis(path) != 1:
        yield "over another axis than the layer's channels"
    weight, bias = path[-1].args[1], (*path[-1].args, None)[2]
    layer = net.get_submodule(layer_name(path[-1]))
    is_plain = isinstance(layer, _ConvNd | nn.Linear) and _is_own(weight)
    if not is_plain or (bias is None) != (layer.bias is None):
        yield "behind a layer whose weight or bias is computed"
    tensors = [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]
    if any(num_uses[id(tensor)] != 1 for tensor in tensors):
        yield "behind a layer that is used more than once or shares its weights"


def _norm_name(node: fx.Node) -> str:
    """The path of the module of a normalisation."""
    own = [arg for arg in node.args[1:5] if _is_own(arg)]
    return str(cast("fx.Node", own[-1]).target).rpartition(".")[0] if own else layer_of(node)


def _is_own(argument: Any) -> bool:
    """Whether an argument of a node is a parameter or buffer of the net."""
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _count_uses(graph: fx.Graph, net: nn.Module) -> Counter[int]:
    """How many nodes read each tensor, and how many further modules hold it, by the tensor's id."""
    tensors = dict(named_weights(net))
    uses = Counter[int]()
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in tensors:
            uses[id(tensors[str(node.target)])] += len(node.users)
    holders = Counter(id(held) for each in net.modules() for held in each.parameters(recurse=False))
    for tensor, num_holders in holders.items():
        uses[tensor] += num_holders - 1
    return uses


def _path_to_layer(node: fx.Node) -> list[fx.Node]:
    """From the input of a normalisation back to the first node that computes something."""
    path = [cast("fx.Node", node.args[0])]
    while _only_moves(path[-1]):
        path.append(cast("fx.Node", path[-1].args[0]))
    return path


def _only_moves(node: fx.Node) -> bool:
    if node.target in DROPOUTS:
        return cast("float", node.args[1]) == 0
    return node.target in RESHAPES | SWAPS | COPIES


def _channel_axis(path: list[fx.Node]) -> int | None:
    """Where the layer's channels are once they reach the normalisation; None: they are mixed."""
    layer = path[-1]
    axis: int | None = layer.meta["val"].ndim - 1 if layer.target == aten.linear.default else 1
    for node in reversed(path[:-1]):
        if axis is not None:
            axis = _axis_after(node, axis)
    return axis


def _axis_after(node: fx.Node, axis: int) -> int | None:
    before, after = cast("fx.Node", node.args[0]).meta["val"].shape, node.meta["val"].shape
    if node.target in SWAPS:
        # the operator itself, on a tensor whose only axis longer than 1 is the one to follow
        probe = torch.empty([2 if place == axis else 1 for place in range(len(before))])
        moved = cast("Any", node.target)(probe, *node.args[1:])
        return moved.shape.index(2)
    size, behind = before[axis], math.prod(before[axis + 1 :])
    for place, new_size in enumerate(after):
        is_fixed = isinstance(new_size, int)  # not the open size of a batch
        if is_fixed and new_size == size and math.prod(after[place + 1 :]) == behind:
            return place
    return None


def _folded(layer: nn.Module, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The weight and the bias of `layer` with `norm` behind it."""
    is_transposed = isinstance(layer, _ConvTransposeNd)
    # a transposed convolution numbers its output channels within each group
    groups = cast("int", layer.groups) if is_transposed else 1
    tensors = (layer.weight, layer.bias, norm.running_mean, norm.running_var)
    parts = zip(
        *(_in_groups(each, groups) for each in (*tensors, norm.weight, norm.bias)), strict=True
    )
    folded = [
        fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift, is_transposed)
        for weight, bias, mean, variance, scale, shift in parts
    ]
    weights, biases = zip(*folded, strict=True)
    return torch.cat(weights), torch.cat(biases)


def _in_groups(tensor: Any, groups: int) -> list[Any]:
    return [None] * groups if tensor is None else list(tensor.double().chunk(groups))


def _set_tensors(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """New parameters of the old weight's type: shared with no other layer, trained as it was."""
    old = cast("nn.Parameter", layer.weight)
    for name, tensor in (("weight", weight), ("bias", bias)):
        new = tensor.detach().to(old).clone()
        setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))


def _replace(net: nn.Module, norm: nn.Module) -> None:
    """Put what is left of `norm` wherever `net` holds it."""
    rest: nn.Module = nn.Identity()
    if isinstance(norm, BatchNormAct2d):
        rest = nn.Sequential(OrderedDict(drop=norm.drop, act=norm.act))
    rest.train(norm.training)
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):
            if child is norm:
                setattr(parent, name, rest)
