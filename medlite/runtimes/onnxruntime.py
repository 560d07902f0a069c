"""ONNX Runtime, on the CPU or on CUDA."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlite.errors import MissingDependency
from medlite.runtimes.threads import count_threads
from medlite.types import Artifact, Hardware

if TYPE_CHECKING:
    import numpy as np

CUDA = "CUDAExecutionProvider"

BATCH_AXIS = "batch"
"""the name that export/ gives to the open axis"""

_EIGHT_BIT = ("QLinear", "QGemm", "QAttention", "ConvInteger", "MatMulInteger", "DynamicQuantizeM")
"""How the operators begin that compute on 8-bit integers."""

_WEIGHTS_ALONE = {"w4", "w3", "w2"}
"""The precisions of artifacts that hold integers without computing on any."""


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """ONNX Runtime in its sequential mode, one operator after another.

    Each batch size gets a graph of its own, optimised for that size (1.07 times faster on
    MobileNetV3 than one graph for all sizes), when it is first met.

    Args:
        name: stands in the keys of the measurements.
        allow_spinning: let idle threads wait actively: quicker on an idle machine, harmful where
            cores are shared.
    """

    name: str = "onnxruntime"
    allow_spinning: bool = False
    format: str = field(default="onnx", init=False)

    def refuses(self, hardware: Hardware) -> str:
        """Why nothing can be run on `hardware` here; "" where it can."""
        import onnxruntime

        available = onnxruntime.get_available_providers()
        if hardware.device == "cpu" or CUDA in available:
            return ""
        return (
            f"hardware.device={hardware.device} needs ONNX Runtime's {CUDA}, this build has "
            f"{', '.join(available)}; install it with: pip install onnxruntime-gpu"
        )

    def load(self, artifact: Artifact, hardware: Hardware) -> OnnxSession:
        """Open `artifact`; the graph for batches of one is built at once.

        Raises:
            MissingDependency: `hardware` wants CUDA, and this build has none or cannot load it.
        """
        reason = self.refuses(hardware)
        if reason:
            raise MissingDependency(reason)
        session = OnnxSession(self, artifact, hardware)
        session.prepare(1)
        return session

    def describe(self, hardware: Hardware) -> dict[str, str]:
        """Engine, version and backend configuration."""
        import onnxruntime

        return {
            "engine": "ONNX Runtime",
            "version": onnxruntime.__version__,
            "backend": ", ".join(_providers(hardware)),
            "options": "all graph optimisations, sequential execution, one inter-op thread, "
            f"spinning {'on' if self.allow_spinning else 'off'}, static batch size",
        }

    def count_operators(self, artifact: Artifact, hardware: Hardware) -> dict[str, int]:
        """Operators of the optimised graph, those in the bodies of loops and scans included."""
        import onnx
        import onnxruntime

        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "optimised.onnx"
            options = self.session_options(hardware, batch_size=1, precision=artifact.precision)
            options.optimized_model_filepath = str(path)
            onnxruntime.InferenceSession(
                str(artifact.path), options, providers=_providers(hardware)
            )
            graph = onnx.load(path, load_external_data=False).graph
        counts = Counter(_operator_names(graph))
        return {_label(name): count for name, count in sorted(counts.items())}

    def session_options(self, hardware: Hardware, *, batch_size: int, precision: str) -> Any:
        """`onnxruntime.SessionOptions` as every session of this runtime uses them.

        Args:
            hardware: sets the threads.
            batch_size: the graph is optimised for it.
            precision: of the artifact; weights that alone are stored in few bits are unpacked
                once, when the session is made, and not at every query.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = count_threads(hardware)
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "1" if self.allow_spinning else "0"
        )
        if precision in _WEIGHTS_ALONE:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_free_dimension_override_by_name(BATCH_AXIS, batch_size)
        return options


class OnnxSession:
    """A loaded model: (B, C, H, W[, D]) float32 in, logits (B, K[, H, W, D]) float32 out."""

    def __init__(self, runtime: OnnxRuntime, artifact: Artifact, hardware: Hardware) -> None:
        self._runtime = runtime
        self._path = str(artifact.path)
        self._precision = artifact.precision
        self._hardware = hardware
        self._sessions: dict[int, Any] = {}
        self._input_name = ""

    def prepare(self, batch_size: int) -> Any:
        """The engine's own session for this batch size, made where it is not there yet."""
        import onnxruntime

        if batch_size not in self._sessions:
            options = self._runtime.session_options(
                self._hardware, batch_size=batch_size, precision=self._precision
            )
            session = onnxruntime.InferenceSession(
                self._path, options, providers=_providers(self._hardware)
            )
            _check_device(session, self._hardware)
            self._sessions[batch_size] = session
            self._input_name = session.get_inputs()[0].name
        return self._sessions[batch_size]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Run one batch."""
        session = self.prepare(len(images))
        return session.run(None, {self._input_name: images})[0]


def _providers(hardware: Hardware) -> list[str]:
    on_cpu = ["CPUExecutionProvider"]
    return on_cpu if hardware.device == "cpu" else [CUDA, *on_cpu]


def _check_device(session: Any, hardware: Hardware) -> None:
    """Refuse a session that fell back to the CPU, which the engine itself only warns of.

    Raises:
        MissingDependency: CUDA was asked for and could not be loaded.
    """
    found = session.get_providers()
    if hardware.device == "cuda" and CUDA not in found:
        message = (
            f"hardware.device=cuda, but ONNX Runtime could not load {CUDA} and fell back to "
            f"{', '.join(found)}; its CUDA, cuDNN and driver must be those that this "
            "onnxruntime-gpu was built for (https://onnxruntime.ai/docs/execution-providers)"
        )
        raise MissingDependency(message)


def _operator_names(graph: Any) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _operator_names(attribute.g)


def _label(operator: str) -> str:
    return f"int8:{operator}" if operator.startswith(_EIGHT_BIT) else operator
