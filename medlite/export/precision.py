"""Which numbers an exported program holds, as `Artifact.precision` names them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.export import ExportedProgram

ROUND = "quantized_decomposed.quantize_per_tensor.default"
UNROUND_CHANNELS = "quantized_decomposed.dequantize_per_channel.default"

"""names, because the operators exist only where something has quantised"""

LARGEST_CODE = 5
"""the position of the largest code among the arguments of `UNROUND_CHANNELS`"""

HALF_PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def precision_of(program: ExportedProgram) -> str:
    """The name of the numbers in which a runtime is asked to compute, or to store weights.

    Returns:
        "int8" where activations are rounded; "w4", "w3" or "w2" where weights alone are, to so
        many bits; "fp16" or "bf16" where layers work in half precision; otherwise "fp32".
    """
    if any(str(node.target) == ROUND for node in program.graph.nodes):
        return "int8"
    bits = weight_bits(program)
    if bits is not None:
        return f"w{bits}"
    used = {HALF_PRECISIONS.get(dtype) for dtype in _parameter_types(program)} - {None}
    return next((str(name) for name in used), "fp32")


def weight_bits(program: ExportedProgram) -> int | None:
    """The bits of weights that alone are rounded; None where no weight is, or not alone."""
    nodes = list(program.graph.nodes)
    if any(str(node.target) == ROUND for node in nodes):
        return None
    largest_codes = [
        node.args[LARGEST_CODE] for node in nodes if str(node.target) == UNROUND_CHANNELS
    ]
    return max(map(_bits_of, largest_codes), default=None)


def _bits_of(largest_code: fx.node.Argument) -> int:
    """The bits of symmetric codes.

    >>> [_bits_of(code) for code in (1, 3, 7, 127)]
    [2, 3, 4, 8]
    """
    assert isinstance(largest_code, int)
    return largest_code.bit_length() + 1


def _parameter_types(program: ExportedProgram) -> Iterator[torch.dtype]:
    return (tensor.dtype for tensor in program.state_dict.values())
