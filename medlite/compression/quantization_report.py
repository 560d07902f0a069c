"""What the card says about a quantised net."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch.fx import GraphModule

from medlite.compression.quantized_graph import kept_in_words
from medlite.compression.quantizer import Int8Quantizer

TERNARY_BITS = 2


def report_quantization(
    prepared: GraphModule, quantizer: Int8Quantizer, report: Callable[[str, str], None], how: str
) -> None:
    """Report what is rounded and what is not.

    Args:
        prepared: the graph that `quantizer` has annotated.
        quantizer: after its `annotate`.
        report: takes (topic, text).
        how: how the rounding came to be, in words.
    """
    num_layers = len(quantizer.quantized_layers) + len(quantizer.float_layers)
    share = f"{len(quantizer.quantized_layers)} of {num_layers} weighted layers"
    scales = "a channel" if quantizer.per_channel else "a tensor"
    text = (
        f"INT8 in {share}: uint8 activations with one scale a tensor, int8 weights "
        f"{width_of_weights(quantizer)}with one scale {scales}; {how}"
    )
    if quantizer.is_weight_only:
        text = _describe_weights(quantizer, share, scales, how)
    report("quantisation", text)
    report("kept in float", kept_in_words(in_short(quantizer.float_layers), prepared))


def width_of_weights(quantizer: Int8Quantizer) -> str:
    """What to say of the bits of weights that go through 8-bit kernels."""
    if quantizer.weight_bits == 7:
        return "of 7 bits (exact on every processor) "
    return "of 8 bits (x86 processors without VNNI cut off their sums) "


def in_short(names: Sequence[str]) -> list[str]:
    """The names, with three or more that end alike as one entry.

    >>> in_short(["stem", "a.x_proj", "b.x_proj", "c.x_proj"])
    ['stem', '3 x_proj']
    """
    endings = Counter(name.rpartition(".")[2] for name in names)
    often = {ending for ending, count in endings.items() if count > 2 and not ending.isdigit()}
    shortened = (
        f"{endings[ending]} {ending}" if (ending := name.rpartition(".")[2]) in often else name
        for name in names
    )
    return list(dict.fromkeys(shortened))


def _describe_weights(quantizer: Int8Quantizer, share: str, scales: str, how: str) -> str:
    bits = quantizer.weight_bits
    ternary = " (ternary: -1, 0, 1)" if bits == TERNARY_BITS else ""
    stored = {
        4: "4 bits each in ONNX and OpenVINO files",
        3: "4 bits each in ONNX and OpenVINO files, which know no 3",
        2: "2 bits each in ONNX files, 4 in OpenVINO's, which know no signed 2",
    }[bits]
    return (
        f"weights in {bits} bits{ternary} in {share}, with one scale {scales}, activations in "
        f"float; {how}. Stored in {stored}, 8 in torch's, and ExecuTorch cannot hold them; a "
        "runtime computes in float: smaller files, not faster"
    )
