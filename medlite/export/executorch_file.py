"""ExecuTorch: an exported program as one file, its graph given to XNNPACK as far as that goes.

Programs are of one image: memory is planned ahead for fixed sizes, and scans are written out.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS, SoftmaxConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import fx
from torch._export.verifier import SpecViolationError
from torch.export import ExportedProgram
from torch.fx.traceback import NodeSource

from medlite.errors import ExportError
from medlite.export.decompose import decompose
from medlite.export.precision import weight_bits
from medlite.export.trace import custom_operators, first_line
from medlite.export.xnnpack_forms import XNNPACK_FORMS

ROUND = torch.ops.quantized_decomposed.quantize_per_tensor.default
UNROUND = torch.ops.quantized_decomposed.dequantize_per_tensor.default
UNROUND_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default
CONCATENATIONS = {torch.ops.aten.cat.default, torch.ops.aten.concat.default}
ROUNDINGS = "quantized_decomposed::"
"""how the names of the operators begin that a quantised graph rounds with; XNNPACK takes them"""


class SoftmaxOfRows(SoftmaxConfig):
    """What XNNPACK takes of softmax: nothing with four axes.

    It keeps the maps (B, C, H, W) between convolutions with the channels innermost, and
    ExecuTorch 1.5.1 lets a softmax over W there go over C: wrong without a word, as in
    EfficientFormerV2, whose attention maps pass through convolutions.
    """

    def check_constraints(self, node: fx.Node, ep: ExportedProgram) -> bool:
        """Whether `node` may go to XNNPACK."""
        return node.meta["val"].ndim != 4 and super().check_constraints(node, ep)


def to_executorch(program: ExportedProgram) -> bytes:
    """Translate `program` for batches of one image, and run it once.

    Raises:
        ExportError: as `lower`, or weights alone are quantised, or ExecuTorch cannot run what it
            wrote.
    """
    bits = weight_bits(program)
    if bits is not None:
        message = (
            f"ExecuTorch cannot hold weights of {bits} bits beside activations in float; set "
            "weight_bits=8, or take runtime=onnxruntime or runtime=openvino"
        )
        raise ExportError(message)
    program = _of_one_image(program)
    lowered = lower(program)
    _try_out(lowered, program.example_inputs[0])
    return lowered


def lower(program: ExportedProgram) -> bytes:
    """Translate `program`, whose sizes are all fixed.

    Opaque operators are replaced by their registered decompositions.

    Raises:
        ExportError: an operator without decomposition, or that ExecuTorch does not know.
    """
    configs = [SoftmaxOfRows if c is SoftmaxConfig else c for c in ALL_PARTITIONER_CONFIGS]
    with _quiet(), _sharing_provenance():
        opaque = {name for name in custom_operators(program) if not name.startswith(ROUNDINGS)}
        program = decompose(program, opaque).run_decompositions(XNNPACK_FORMS)
        try:
            partitioner = XnnpackPartitioner(configs=configs)
            edge = to_edge_transform_and_lower(program, partitioner=[partitioner])
            return bytes(edge.to_executorch().buffer)
        except (RuntimeError, ValueError, SpecViolationError) as error:
            message = f"ExecuTorch cannot hold this network: {first_line(error)}"
            raise ExportError(message) from error


def _of_one_image(program: ExportedProgram) -> ExportedProgram:
    """`program` for a batch of one and nothing else."""
    (name,) = program.graph_signature.user_inputs
    images = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    module = program.module(check_guards=False)
    _round_to_signed(module)
    _concatenate_equal_codes(module)
    _add_weight_zero_points(module)
    return torch.export.export(module, (torch.zeros(1, *images.shape[1:]),), strict=False)


def _round_to_signed(module: fx.GraphModule) -> None:
    """Shift 8-bit codes from [0, 255] to the [-128, 127] that XNNPACK computes on; exact."""
    for node in module.graph.nodes:
        if node.target in {ROUND, UNROUND} and node.args[5] == torch.uint8:
            values, scale, zero_point, low, high, _ = node.args
            node.args = (values, scale, zero_point - 128, low - 128, high - 128, torch.int8)
    module.recompile()


def _concatenate_equal_codes(module: fx.GraphModule) -> None:
    """Round what is joined to the codes of the joint map first, as XNNPACK wants it; exact.

    Rounding each part by a scale is the same as rounding the whole by it, and again does nothing.
    """
    for node in [node for node in module.graph.nodes if node.target in CONCATENATIONS]:
        roundings = {user.args[1:] for user in node.users if user.target == ROUND}
        if len(roundings) != 1 or any(user.target != ROUND for user in node.users):
            continue
        (codes,) = roundings
        for part in dict.fromkeys(node.args[0]):
            with module.graph.inserting_before(node):
                rounded = module.graph.call_function(ROUND, (part, *codes))
                unrounded = module.graph.call_function(UNROUND, (rounded, *codes))
            node.replace_input_with(part, unrounded)
    module.recompile()


def _add_weight_zero_points(module: fx.GraphModule) -> None:
    """Zeros where a weight of 8 bits has no zero points: XNNPACK's partitioner asks for them."""
    for node in module.graph.nodes:
        if node.target == UNROUND_WEIGHT and node.args[2] is None:
            name = f"{node.name}_zero_points"
            scales = fx.graph_module._get_attr(module, node.args[1].target)
            module.register_buffer(name, torch.zeros_like(scales, dtype=torch.int64))
            with module.graph.inserting_before(node):
                node.update_arg(2, module.graph.get_attr(name))
    module.recompile()


def _try_out(lowered: bytes, inputs: Any) -> None:
    """Whether each operator has a kernel, for these sizes too, shows only when it runs."""
    from executorch.extension.pybindings import portable_lib

    try:
        portable_lib._load_for_executorch_from_buffer(lowered).forward(inputs)
    except RuntimeError as error:
        message = (
            "ExecuTorch has no kernel for some operator of this network (its log, above, says "
            f"which): {first_line(error)}; 3-D convolutions are known to be missing"
        )
        raise ExportError(message) from error


@contextmanager
def _sharing_provenance() -> Iterator[None]:
    """Let nodes share the records of where they come from.

    Each of some fifty passes copies those of every node to their full depth: a third of the
    time. Torch 2.14 cannot be told to leave them out.
    """
    NodeSource.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del NodeSource.__deepcopy__  # type: ignore[attr-defined]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and ExecuTorch warn of their own code."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
