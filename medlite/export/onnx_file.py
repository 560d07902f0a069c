"""ONNX: an exported program as one self-contained file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch.export import ExportedProgram

from medlite.errors import ExportError
from medlite.export import packed_weights
from medlite.export.decompose import decompose, with_decomposition
from medlite.export.precision import weight_bits
from medlite.export.trace import custom_operators, first_line, layer_of

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
BATCH_AXIS = "batch"

SSD_SCAN = "medlite::ssd_scan"

PLACEHOLDERS = "medlite"
"""the domain of nodes that every engine gets in a form of its own"""


def to_onnx(program: ExportedProgram, engine: str) -> torch.onnx.ONNXProgram:
    """Translate the `program` of a network: images in, logits out, any number of them.

    Args:
        program: left as it is.
        engine: as `translate`.

    Raises:
        ExportError: as `translate`.
    """
    return translate(
        program,
        engine,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_shapes=({0: BATCH_AXIS},),
    )


def translate(program: ExportedProgram, engine: str, **options: Any) -> torch.onnx.ONNXProgram:
    """Translate `program`; node metadata (layer names, source lines) are still in the result.

    Opaque operators without a translation are replaced by their registered decompositions.
    Selective scans are placeholders until `for_engine` has written them out.

    Args:
        program: left as it is.
        engine: "onnxruntime" or "openvino"; the result is the same where
            `is_same_for_all_engines`.
        **options: names and shapes, as `torch.onnx.export` takes them.

    Raises:
        ExportError: operators that ONNX lacks, each with the layers that hold it.
    """
    table = _translations(program, engine)
    translated_names = {operator._schema.name for operator in table}
    program = decompose(program, with_decomposition(program) - translated_names)
    bits = weight_bits(program)
    try:
        translated = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=packed_weights.OPSETS.get(bits) if bits else None,
            external_data=False,
            verbose=False,
            optimize=False,
            custom_translation_table=table,
            **options,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(_explain(program, error)) from error
    assert translated is not None
    return translated


def is_same_for_all_engines(program: ExportedProgram) -> bool:
    """Whether no engine has an operator of its own for a part of `program`."""
    return SSD_SCAN not in custom_operators(program)


def for_engine(translated: torch.onnx.ONNXProgram, engine: str) -> torch.onnx.ONNXProgram:
    """A copy whose scans are written out as is best on `engine`, optimised.

    Args:
        translated: by `to_onnx`; left as it is.
        engine: "onnxruntime" or "openvino".
    """
    model = translated.model.clone()
    if any(node.domain == PLACEHOLDERS for node in model.graph):
        from medlite.export.selective_scan_onnx import lower_scans

        lower_scans(model, engine)
    copied = torch.onnx.ONNXProgram(model, translated.exported_program)
    copied.optimize()
    packed_weights.merge_equal_scales(copied.model)
    program = translated.exported_program
    bits = program and weight_bits(program)
    if bits in packed_weights.OPSETS:
        packed_weights.pack_weights(copied.model, bits, engine)
    return copied


def save(translated: torch.onnx.ONNXProgram, path: Path) -> None:
    """Write to `path`, weights inside, without the metadata that name source files."""
    ClearMetadataAndDocStringPass()(translated.model)
    graph = translated.model.graph
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    translated.save(str(path), external_data=False)


def _translations(program: ExportedProgram, engine: str) -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = {}
    operators = custom_operators(program)
    if "medlite::selective_scan" in operators:
        from medlite.export import selective_scan_onnx

        table |= selective_scan_onnx.translation_table()
    if "medlite::wavefront_scan" in operators:
        from medlite.export import wavefront_onnx

        table |= wavefront_onnx.translation_table()
    if SSD_SCAN in operators and engine == "onnxruntime":
        from medlite.export import ssd_onnx

        table |= ssd_onnx.translation_table()
    return table


def _explain(program: ExportedProgram, error: BaseException) -> str:
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    text = "\n".join(str(cause) for cause in causes)
    operators = sorted(set(re.findall(r"target=torch\.ops\.([\w.]+)", text)))
    if not operators:
        return f"ONNX cannot hold this network: {first_line(causes[-1])}"
    held = "; ".join(f"'{name}' in {_holders(program, name)}" for name in operators)
    return (
        f"ONNX has no operator for {held}; replace it by operators of torch, or give it a "
        "translation and export with format 'torch' until then"
    )


def _holders(program: ExportedProgram, operator: str) -> str:
    layers = {layer_of(node) for node in program.graph.nodes if str(node.target) == operator}
    named = sorted(layer for layer in layers if layer)
    return f"layer {', '.join(repr(layer) for layer in named)}" if named else "an unnamed layer"
