"""From a network to the file that a runtime loads."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from medlite.errors import ExportError, did_you_mean
from medlite.export.onnx_file import write_onnx
from medlite.export.trace import custom_operators, deployable, modules_registering, trace
from medlite.types import Artifact


def export(
    net: nn.Module, *, format: str, input_shape: tuple[int, ...], directory: Path, stem: str
) -> Artifact:
    """Write `net` as `<directory>/<stem>.*` and describe what was written.

    The network may be an ordinary module, which is exported in its deployable form
    (`net.deploy()` where it has that), or a graph that pt2e quantisation converted, whose
    precision is then "int8". The files appear under their names only when they are complete.

    Args:
        net: (B, C, H, W[, D]) float32 -> logits (B, K[, H, W, D]).
        format: "onnx" (one file), "openvino" (.xml and .bin) or "torch" (.pt2).
        input_shape: (C, H, W[, D]) of one image; the batch axis stays dynamic.
        directory: made where it is missing.
        stem: file name without its ending.

    Raises:
        ExportError: an unknown format, or a network that it cannot hold; names the layer.
    """
    if format not in _WRITERS:
        message = f"unknown export format {format!r}; {did_you_mean(format, _WRITERS)}"
        raise ExportError(message)
    write, endings = _WRITERS[format]
    program = trace(deployable(net), input_shape)
    operators = custom_operators(program)
    files = _write_atomically(program, write, [directory / f"{stem}{end}" for end in endings])
    return Artifact(
        path=files[0],
        files=tuple(files),
        format=format,
        input_shape=tuple(input_shape),
        output_shape=_output_shape(program),
        precision="int8" if any("quantized_decomposed" in name for name in operators) else "fp32",
        num_bytes=sum(file.stat().st_size for file in files),
        sha256=digest(files),
        imports=modules_registering(operators) if format == "torch" else (),
    )


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of the contents of `files`, one after another, in hexadecimal."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    write_onnx(program, path)


def _write_openvino(program: ExportedProgram, path: Path) -> None:
    import openvino

    onnx_path = path.with_suffix(".onnx")
    write_onnx(program, onnx_path)
    try:
        # read_model and not convert_model: the latter reports usage over the network
        model = openvino.Core().read_model(onnx_path)
    except RuntimeError as error:
        message = f"OpenVINO cannot read the ONNX form of this network: {error}"
        raise ExportError(message) from error
    openvino.save_model(model, path, compress_to_fp16=False)


def _write_torch(program: ExportedProgram, path: Path) -> None:
    """Without the example images and the source lines, which name folders of this machine."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    torch.export.save(program, path)


_WRITERS: dict[str, tuple[Callable[[ExportedProgram, Path], None], tuple[str, ...]]] = {
    "onnx": (_write_onnx, (".onnx",)),
    "openvino": (_write_openvino, (".xml", ".bin")),
    "torch": (_write_torch, (".pt2",)),
}
"""How each format is written, and the endings of its files, the one to load first."""


def _write_atomically(
    program: ExportedProgram,
    write: Callable[[ExportedProgram, Path], None],
    files: Sequence[Path],
) -> list[Path]:
    directory = files[0].parent
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as scratch:
        drafts = [Path(scratch) / file.name for file in files]
        write(program, drafts[0])
        for draft, file in zip(reversed(drafts), reversed(files), strict=True):
            draft.replace(file)
    return list(files)


def _output_shape(program: ExportedProgram) -> tuple[int, ...]:
    outputs = program.graph.output_node().args[0]
    assert isinstance(outputs, tuple)
    if len(outputs) != 1:
        message = f"the network must return one tensor of logits, not {len(outputs)} outputs"
        raise ExportError(message)
    return tuple(int(side) for side in outputs[0].meta["val"].shape[1:])
