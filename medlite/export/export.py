"""From a network to the file that a runtime loads."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from medlite.errors import ExportError, did_you_mean
from medlite.export.onnx_file import for_engine, is_same_for_all_engines, save, to_onnx
from medlite.export.precision import precision_of, weight_bits
from medlite.export.trace import custom_operators, deployable, modules_registering, trace
from medlite.optional import require
from medlite.runtimes.openvino_core import openvino_core
from medlite.types import Artifact


def export(
    net: nn.Module, *, format: str, input_shape: tuple[int, ...], directory: Path, stem: str
) -> Artifact:
    """Write `net` as `<directory>/<stem>.*` and describe what was written.

    The network may be an ordinary module, which is exported in its deployable form
    (`net.deploy()` where it has that), or a graph that pt2e quantisation converted or that was
    cast to half precision. The files appear under their names only when they are complete.

    Args:
        net: (B, C, H, W[, D]) float32 -> logits (B, K[, H, W, D]).
        format: "onnx" (one file), "openvino" (.xml and .bin), "executorch" (.pte) or "torch"
            (.pt2).
        input_shape: (C, H, W[, D]) of one image; the batch axis stays dynamic, but for
            "executorch", whose programs take one image.
        directory: made where it is missing.
        stem: file name without its ending.

    Raises:
        ExportError: an unknown format, or a network that it cannot hold; names the layer.
        MissingDependency: the format needs a package that is not installed.
    """
    artifacts = export_all(
        net, formats=[format], input_shape=input_shape, directory=directory, stem=stem
    )
    return artifacts[format]


def export_all(
    net: nn.Module,
    *,
    formats: Iterable[str],
    input_shape: tuple[int, ...],
    directory: Path,
    stem: str,
) -> dict[str, Artifact]:
    """As `export`, to several formats that share the tracing and the translation to ONNX.

    Returns:
        format -> artifact.

    Raises:
        ExportError: as `export`.
    """
    formats = list(formats)
    for format in formats:
        if format not in _WRITERS:
            message = f"unknown export format {format!r}; {did_you_mean(format, _WRITERS)}"
            raise ExportError(message)
    traced = _Traced(trace(deployable(net), input_shape))
    return {format: _write(traced, format, input_shape, directory, stem) for format in formats}


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of the contents of `files`, one after another, in hexadecimal."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


class _Traced:
    """A program, and its translations to ONNX once something asks for them."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self._onnx: dict[str, torch.onnx.ONNXProgram] = {}

    def save_onnx(self, path: Path, *, engine: str) -> None:
        key = "all" if is_same_for_all_engines(self.program) else engine
        if key not in self._onnx:
            self._onnx[key] = to_onnx(self.program, engine)
        save(for_engine(self._onnx[key], engine), path)


def _write_onnx(traced: _Traced, path: Path) -> None:
    if precision_of(traced.program) == "bf16":
        message = (
            "ONNX Runtime has no bfloat16 kernels for the CPU; set "
            "compression.half.dtype=float16, or take runtime=openvino or runtime=torch"
        )
        raise ExportError(message)
    traced.save_onnx(path, engine="onnxruntime")


def _write_openvino(traced: _Traced, path: Path) -> None:
    import openvino

    onnx_path = path.with_suffix(".onnx")
    traced.save_onnx(onnx_path, engine="openvino")
    try:
        model = openvino_core().read_model(onnx_path)
    except RuntimeError as error:
        message = f"OpenVINO cannot read the ONNX form of this network: {error}"
        raise ExportError(message) from error
    if weight_bits(traced.program) is not None:
        # otherwise linear layers with 4-bit weights round their inputs to 8 bits by themselves
        model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    openvino.save_model(model, path, compress_to_fp16=False)


def _write_executorch(traced: _Traced, path: Path) -> None:
    require("executorch", extra="executorch", needed_by="the format 'executorch'")
    from medlite.export.executorch_file import to_executorch

    path.write_bytes(to_executorch(traced.program))


def _write_torch(traced: _Traced, path: Path) -> None:
    """Without the example images and the source lines, which name folders of this machine."""
    program = copy.copy(traced.program)
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    torch.export.save(program, path)


_WRITERS: dict[str, tuple[Callable[[_Traced, Path], None], tuple[str, ...]]] = {
    "onnx": (_write_onnx, (".onnx",)),
    "openvino": (_write_openvino, (".xml", ".bin")),
    "executorch": (_write_executorch, (".pte",)),
    "torch": (_write_torch, (".pt2",)),
}
"""How each format is written, and the endings of its files, the one to load first."""


def _write(
    traced: _Traced, format: str, input_shape: tuple[int, ...], directory: Path, stem: str
) -> Artifact:
    write, endings = _WRITERS[format]
    files = [directory / f"{stem}{ending}" for ending in endings]
    operators = custom_operators(traced.program)
    imports = modules_registering(operators) if format == "torch" else ()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as scratch:
        drafts = [Path(scratch) / file.name for file in files]
        write(traced, drafts[0])
        for draft, file in zip(reversed(drafts), reversed(files), strict=True):
            draft.replace(file)
    return Artifact(
        path=files[0],
        files=tuple(files),
        format=format,
        input_shape=tuple(input_shape),
        output_shape=_output_shape(traced.program),
        precision=precision_of(traced.program),
        num_bytes=sum(file.stat().st_size for file in files),
        sha256=digest(files),
        imports=imports,
    )


def _output_shape(program: ExportedProgram) -> tuple[int, ...]:
    outputs = program.graph.output_node().args[0]
    assert isinstance(outputs, tuple)
    if len(outputs) != 1:
        message = f"the network must return one tensor of logits, not {len(outputs)} outputs"
        raise ExportError(message)
    return tuple(int(side) for side in outputs[0].meta["val"].shape[1:])
