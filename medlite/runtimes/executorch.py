"""ExecuTorch, on the CPU: the runtime for phones and small boards, with the kernels of XNNPACK."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from medlite.errors import MissingDependency
from medlite.optional import require
from medlite.runtimes.threads import count_threads
from medlite.types import Artifact, Hardware

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class ExecuTorchRuntime:
    """ExecuTorch with XNNPACK, through its Python bindings.

    Programs take one image; the images of a batch are run one after another. The bindings load
    torch, which counts in the memory of the measuring process and would not be on a device.

    All sessions of a process share one pool of threads, which is made anew where the profile asks
    for another number: a session from before must not be used after that.

    Args:
        name: stands in the keys of the measurements.

    Raises:
        MissingDependency: ExecuTorch is not installed; found when the runtime is named, before
            anything is trained for it.
    """

    name: str = "executorch"
    format: str = field(default="executorch", init=False)

    def __post_init__(self) -> None:
        require("executorch", extra="executorch", needed_by="runtime=executorch")

    def refuses(self, hardware: Hardware) -> str:
        """Why nothing can be run on `hardware` here; "" where it can."""
        if hardware.device == "cpu":
            return ""
        return (
            f"hardware.device={hardware.device}: ExecuTorch runs on CPUs here; take "
            "runtime=onnxruntime or runtime=torch for CUDA"
        )

    def load(self, artifact: Artifact, hardware: Hardware) -> ExecuTorchSession:
        """Open `artifact`.

        Raises:
            MissingDependency: `hardware` is not a CPU, or ExecuTorch cannot be imported.
        """
        reason = self.refuses(hardware)
        if reason:
            raise MissingDependency(reason)
        bindings = _bindings()
        if bindings._threadpool_get_thread_count() != count_threads(hardware):
            bindings._unsafe_reset_threadpool(count_threads(hardware))
        return ExecuTorchSession(bindings._load_for_executorch(str(artifact.path)))

    def describe(self, hardware: Hardware) -> dict[str, str]:
        """Engine, version and backend configuration.

        The engine is loaded for it, so that a process without a model shows what that takes.
        """
        _bindings()
        return {
            "engine": "ExecuTorch",
            "version": metadata.version("executorch"),
            "backend": "XNNPACK, ExecuTorch's own kernels for what that does not take",
            "options": "one image at a time, a batch in a loop; Python bindings, which load torch",
        }

    def count_operators(self, artifact: Artifact, hardware: Hardware) -> dict[str, int]:
        """Operators of the program; those that XNNPACK does not take begin with "outside XNNPACK".

        Views within XNNPACK count as well as what computes.
        """
        from medlite.runtimes.executorch_program import operators

        return dict(sorted(Counter(operators(artifact.path.read_bytes())).items()))


class ExecuTorchSession:
    """A loaded model: (B, C, H, W[, D]) float32 in, logits (B, K[, H, W, D]) float32 out."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Run the images of a batch, one after another."""
        import numpy as np
        import torch

        batch = torch.from_numpy(np.ascontiguousarray(images))
        return np.concatenate(
            [self._module.forward((image,))[0].numpy() for image in batch.split(1)]
        )


def _bindings() -> Any:
    install = {"extra": "executorch", "needed_by": "runtime=executorch"}
    try:
        return require("executorch.extension.pybindings.portable_lib", **install)
    except ImportError as error:
        message = (
            f"the installed ExecuTorch cannot be loaded ({error}): each release is built for one "
            "of torch; install the one that goes with medlite: pip install -U 'medlite[executorch]'"
        )
        raise MissingDependency(message) from error
