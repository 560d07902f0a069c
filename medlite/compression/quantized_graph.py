"""A trained net as a graph that is rounded, calibrated, trained and converted.

The way is torchao's "PT2E": export, prepare, calibrate or train, convert. Batch normalisation is
folded into the layer before it, where it can be, before the export: for post-training quantisation
and for quantisation-aware training alike.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from medlite.compression.batch_norm import replace_batch_norms
from medlite.compression.copies import evaluation_copy, freeze_like
from medlite.compression.fake_quantize import (
    Mode,
    PerTensorFakeQuantize,
    fake_quantizers,
    set_mode,
)
from medlite.compression.norm_folding import find_folds, fold_norms
from medlite.compression.quantizer import DROPOUTS, WEIGHTED, Int8Quantizer
from medlite.errors import ExportError
from medlite.export.trace import deployable, trace

UNROUND = torch.ops.quantized_decomposed.dequantize_per_tensor.default
UNROUND_CHANNELS = torch.ops.quantized_decomposed.dequantize_per_channel.default

PASSES: dict[str, tuple[Mode, ...]] = {
    "minmax": ("measure",),
    "mse": ("measure", "search"),
    "percentile": ("measure", "count"),
}
"""What is done with the calibration images, one pass after another, by method."""


def prepare(net: nn.Module, input_shape: tuple[int, ...], quantizer: Int8Quantizer) -> GraphModule:
    """Export a copy of `net` and put rounding modules where `quantizer` wants them.

    A net with a `deploy()` (re-parameterisable blocks) is taken in its deployed form.

    Args:
        net: (B, C, H, W[, D]) -> logits; left as it is.
        input_shape: (C, H, W[, D]) of one sample; the batch axis stays free.
        quantizer: what is rounded.

    Returns:
        The graph on the CPU, in "measure" mode; what is frozen in `net` is frozen in it.

    Raises:
        ExportError: torch cannot export the net, or a batch normalisation has no running
            statistics.
    """
    return _tidy(prepare_pt2e(exported(net, input_shape, is_trained_further=True), quantizer))


def exported(
    net: nn.Module, input_shape: tuple[int, ...], *, is_trained_further: bool
) -> GraphModule:
    """The graph of a copy of `net`, deployed where it can be; dropouts stay only for training.

    It holds no batch normalisation, because torchao and NNCF would fold one into a convolution
    without asking what else reads that convolution's output (or its weight: pytorch/ao#2795).

    Raises:
        ExportError: torch cannot export the net, or a batch normalisation has no running
            statistics.
    """
    deployed = deployable(evaluation_copy(net))
    freeze_like(deployed, net)  # timm freezes what lies beside the branches that it merges
    if any(isinstance(part, _BatchNorm) for part in deployed.modules()):
        folds, _ = find_folds(deployed, input_shape)
        fold_norms(deployed, folds)
    graph = trace(deployed, input_shape).module(check_guards=False)
    _remove_dropouts(graph, only_idle=is_trained_further)
    replace_batch_norms(graph)
    return graph


@torch.no_grad()
def calibrate(
    prepared: GraphModule,
    images: Tensor,
    *,
    batch_size: int,
    method: str,
    percentile: float = 99.99,
) -> None:
    """Set the range of every activation from `images` (N, C, H, W[, D]).

    Args:
        prepared: the graph; left in "apply" mode.
        images: samples of the training split.
        batch_size: samples at a time.
        method: "minmax" takes all that was seen; "mse" then shrinks every range to the
            fraction of least squared rounding error; "percentile" cuts both ends off.
        percentile: where the upper end is cut; the lower one at 100 - `percentile`.
    """
    set_training(prepared, is_training=False)
    for mode in PASSES[method]:
        set_mode(prepared, mode)
        for batch in images.split(batch_size):
            prepared(batch)
    for part in _activation_parts(prepared).values():
        if method == "mse":
            part.set_range_of_least_error()
        elif method == "percentile":
            part.set_range_of_percentile(percentile)
    set_mode(prepared, "apply")


def set_training(graph: GraphModule, *, is_training: bool) -> None:
    """Switch the dropouts of an exported graph; everything else is the same in both modes.

    `nn.Module.train` means nothing to an exported graph, and torchao's own switch replaces
    every dropout probability by 0.5 (pytorch/ao#4107).
    """
    dropouts = [node for node in graph.graph.nodes if node.target in DROPOUTS]
    changed = [node for node in dropouts if node.args[2] != is_training]
    for node in changed:
        node.args = (*node.args[:2], is_training)
    if changed:
        graph.recompile()


@torch.no_grad()
def convert(prepared: nn.Module, input_shape: tuple[int, ...]) -> GraphModule:
    """Replace rounding by integers: the graph that is exported, with weights as codes in its state.

    The result runs on the CPU and takes every batch size; `train()` and `eval()` change nothing
    in it.

    Args:
        prepared: a graph of `prepare`, calibrated; left as it is.
        input_shape: (C, H, W[, D]) of one sample.

    Raises:
        ExportError: the graph cannot take another batch size than the one it was exported with.
    """
    graph = cast("GraphModule", copy.deepcopy(prepared)).cpu()
    _remove_dropouts(graph, only_idle=False)
    set_mode(graph, "apply")
    graph(torch.zeros(2, *input_shape))  # the scales follow the last optimiser step
    return finished(convert_pt2e(graph), input_shape)


def finished(converted: GraphModule, input_shape: tuple[int, ...]) -> GraphModule:
    """A graph of integers as the runtimes want it, for every batch size.

    Raises:
        ExportError: the graph cannot take another batch size than the one it was exported with.
    """
    _remove_weight_zero_points(converted)
    converted = _tidy(converted).eval()
    _check_batch_sizes(converted, input_shape)
    return converted


def activation_ranges(prepared: nn.Module) -> dict[str, Tensor]:
    """(low, high) as a tensor (2,) for every rounded activation, by name."""
    parts = _activation_parts(prepared).items()
    return {name: torch.stack([part.low, part.high]).cpu() for name, part in parts}


def load_activation_ranges(prepared: GraphModule, ranges: dict[str, Tensor]) -> None:
    """The inverse of `activation_ranges`, on a net that was prepared in the same way."""
    parts = _activation_parts(prepared)
    if parts.keys() != ranges.keys():
        differing = sorted(parts.keys() ^ ranges.keys())
        message = f"the saved ranges belong to another structure; they differ in {differing}"
        raise ValueError(message)
    for name, part in parts.items():
        part.low, part.high = ranges[name].clone().unbind()


def count_quantized(net: nn.Module) -> int:
    """How many weighted operators of a converted net have integer weights."""
    if not isinstance(net, GraphModule):
        return 0
    nodes = [node for node in net.graph.nodes if node.target in WEIGHTED]
    return sum(_is_integer(node.args[1]) for node in nodes)


def count_scans(graph: GraphModule) -> int:
    """How many scans of any kind the graph holds: they stay in float."""
    names = (str(node.target) for node in graph.graph.nodes)
    return sum(name.startswith("medlite.") and "scan" in name for name in names)


def kept_in_words(names: Iterable[str], graph: GraphModule) -> str:
    """Layers that stay in float, and the graph's scans, for a report."""
    scans = count_scans(graph)
    counted = [f"{scans} scan{'s' * (scans != 1)}"] if scans else []
    return ", ".join([*names, *counted]) or "nothing"


def _check_batch_sizes(converted: GraphModule, input_shape: tuple[int, ...]) -> None:
    for batch_size in (1, 3):
        num_outputs = converted(torch.zeros(batch_size, *input_shape)).shape[0]
        if num_outputs != batch_size:
            message = (
                f"the quantised net gives {num_outputs} outputs for {batch_size} images: its "
                "forward() must not depend on the batch size"
            )
            raise ExportError(message)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Node) and value.target in (UNROUND, UNROUND_CHANNELS)


def _activation_parts(prepared: nn.Module) -> dict[str, PerTensorFakeQuantize]:
    parts = fake_quantizers(prepared).items()
    return {name: part for name, part in parts if isinstance(part, PerTensorFakeQuantize)}


def _remove_dropouts(graph: GraphModule, *, only_idle: bool) -> None:
    dropouts = [node for node in graph.graph.nodes if node.target in DROPOUTS]
    for node in [node for node in dropouts if node.args[1] == 0 or not only_idle]:
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    graph.recompile()


def _remove_weight_zero_points(graph: GraphModule) -> None:
    """Leave out the zeros of symmetric weights, but for linear layers in integers.

    Exported, the zeros become one constant for all weights of one width, and OpenVINO 2026.4 then
    runs the whole graph in float as soon as a convolution and a linear layer share it. ONNX
    Runtime 1.32 in turn has no integer Gemm for a weight without zero points.
    """
    for node in graph.graph.nodes:
        if node.target != UNROUND_CHANNELS:
            continue
        readers = [user for user in node.users if user.target == torch.ops.aten.linear.default]
        if not any(_is_integer(reader.args[0]) for reader in readers):
            node.update_arg(2, None)


def _tidy(graph: GraphModule) -> GraphModule:
    """Drop what the graph no longer reads (float weights), and torchao's ban on `eval()`."""
    graph.graph.eliminate_dead_code()
    tidy = GraphModule(graph, graph.graph)
    tidy.meta.update(graph.meta)
    return tidy
