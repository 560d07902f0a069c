"""OpenVINO, on the CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from medlite.errors import MissingDependency
from medlite.runtimes.openvino_core import openvino_core
from medlite.runtimes.threads import count_threads
from medlite.types import Artifact, Hardware

if TYPE_CHECKING:
    import numpy as np

_COMPUTES_NOTHING = {"Const", "Input", "Output", "Parameter", "Result"}
_MOVES_DATA = {"Broadcast", "Concatenation", "Reorder", "Reshape", "Split", "StridedSlice"} | {
    "Gather", "Pad", "Subgraph", "Tile", "Transpose", "FakeQuantize",
}  # fmt: skip
"""Layers that carry 8-bit tensors, or make them, without computing in 8 bits."""


@dataclass(frozen=True, kw_only=True)
class OpenVinoRuntime:
    """OpenVINO tuned for the latency of one stream.

    The precision is stated because the engine's own default is bfloat16 on CPUs that have it:
    "fp32" figures would then be something else. 8-bit graphs still run in 8 bits; the hint
    speaks of their float parts. Each batch size gets a compiled model of its own (1.27 times
    faster on MobileNetV3 than one with a dynamic size) when it is first met.

    Args:
        name: stands in the keys of the measurements.
        performance_hint: "LATENCY" or "THROUGHPUT".
        inference_precision: "f32" or "bf16", for what the graph holds in float.
    """

    name: str = "openvino"
    performance_hint: str = "LATENCY"
    inference_precision: str = "f32"
    format: str = field(default="openvino", init=False)

    def refuses(self, hardware: Hardware) -> str:
        """Why nothing can be run on `hardware` here; "" where it can."""
        if hardware.device == "cpu":
            return ""
        return (
            f"hardware.device={hardware.device}: OpenVINO runs on CPUs here; take "
            "runtime=onnxruntime or runtime=torch for CUDA"
        )

    def load(self, artifact: Artifact, hardware: Hardware) -> OpenVinoSession:
        """Open `artifact`; the model for batches of one is compiled at once.

        Raises:
            MissingDependency: `hardware` is not a CPU.
        """
        session = OpenVinoSession(self, artifact, hardware)
        session.prepare(1)
        return session

    def describe(self, hardware: Hardware) -> dict[str, str]:
        """Engine, version and backend configuration."""
        import openvino

        return {
            "engine": "OpenVINO",
            "version": openvino.__version__,
            "backend": f"CPU ({openvino_core().get_property('CPU', 'FULL_DEVICE_NAME')})",
            "options": f"{self.performance_hint}, one stream, precision hint "
            f"{self.inference_precision}, pinning off, static batch size",
        }

    def count_operators(self, artifact: Artifact, hardware: Hardware) -> dict[str, int]:
        """Layers of the compiled model, with the precision that each computes in."""
        compiled = self.compile(artifact, hardware, batch_size=1)
        counts: Counter[str] = Counter()
        for layer in compiled.get_runtime_model().get_ops():
            information = layer.get_rt_info()
            kind = information["layerType"].astype(str)
            if kind not in _COMPUTES_NOTHING:
                precision = information["runtimePrecision"].astype(str)
                is_eight_bit = precision in {"u8", "i8"} and kind not in _MOVES_DATA
                counts[f"int8:{kind}" if is_eight_bit else kind] += 1
        return dict(sorted(counts.items()))

    def compile(self, artifact: Artifact, hardware: Hardware, *, batch_size: int) -> Any:
        """`openvino.CompiledModel` of `artifact` for batches of `batch_size`."""
        reason = self.refuses(hardware)
        if reason:
            raise MissingDependency(reason)
        core = openvino_core()
        model = core.read_model(artifact.path)
        model.reshape([batch_size, *artifact.input_shape])
        return core.compile_model(model, "CPU", self._properties(hardware))

    def _properties(self, hardware: Hardware) -> dict[str, Any]:
        return {
            "PERFORMANCE_HINT": self.performance_hint,
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": count_threads(hardware),
            "INFERENCE_PRECISION_HINT": self.inference_precision,
            "ENABLE_CPU_PINNING": False,
        }


class OpenVinoSession:
    """A loaded model: (B, C, H, W[, D]) float32 in, logits (B, K[, H, W, D]) float32 out."""

    def __init__(self, runtime: OpenVinoRuntime, artifact: Artifact, hardware: Hardware) -> None:
        self._runtime = runtime
        self._artifact = artifact
        self._hardware = hardware
        self._requests: dict[int, Any] = {}

    def prepare(self, batch_size: int) -> Any:
        """The engine's infer request for this batch size, made where it is not there yet."""
        if batch_size not in self._requests:
            compiled = self._runtime.compile(self._artifact, self._hardware, batch_size=batch_size)
            self._requests[batch_size] = compiled.create_infer_request()
        return self._requests[batch_size]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Run one batch, on the memory of `images` itself."""
        import numpy as np
        import openvino

        request = self.prepare(len(images))
        shared = openvino.Tensor(np.ascontiguousarray(images), shared_memory=True)
        request.set_input_tensor(shared)
        request.infer()
        return request.get_output_tensor().data.copy()
