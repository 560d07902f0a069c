"""Torch itself: the exported program, operator by operator."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from medlite.errors import MissingDependency
from medlite.runtimes.threads import count_threads
from medlite.types import Artifact, Hardware

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class TorchRuntime:
    """The reference: a saved `torch.export` program, run eagerly.

    Quantised programs compute in float here (each value is rounded as 8 bits would round it),
    so that their predictions are those of the 8-bit model, but not their speed.

    Args:
        name: stands in the keys of the measurements.
    """

    name: str = "torch"
    format: str = field(default="torch", init=False)

    def refuses(self, hardware: Hardware) -> str:
        """Why nothing can be run on `hardware` here; "" where it can."""
        import torch

        if hardware.device == "cpu" or torch.cuda.is_available():
            return ""
        return (
            "hardware.device=cuda, but torch sees no CUDA device; it needs an NVIDIA driver and a "
            "CUDA build of torch (https://pytorch.org/get-started)"
        )

    def load(self, artifact: Artifact, hardware: Hardware) -> TorchSession:
        """Open `artifact`.

        Raises:
            MissingDependency: `hardware` wants CUDA and there is none.
        """
        import torch

        reason = self.refuses(hardware)
        if reason:
            raise MissingDependency(reason)
        torch.set_num_threads(count_threads(hardware))
        return TorchSession(_load(artifact), hardware.device)

    def describe(self, hardware: Hardware) -> dict[str, str]:
        """Engine, version and backend configuration."""
        import torch

        return {
            "engine": "torch",
            "version": torch.__version__,
            "backend": f"ATen on {hardware.device} ({torch.backends.cpu.get_cpu_capability()})",
            "options": "torch.export program, eager, inference mode",
        }

    def count_operators(self, artifact: Artifact, hardware: Hardware) -> dict[str, int]:
        """Operators of the program; none computes in 8-bit integers."""
        import torch

        targets = (node.target for node in _load(artifact).graph.nodes)
        operators = (each for each in targets if isinstance(each, torch._ops.OpOverload))
        counts = Counter(each.overloadpacket.__name__ for each in operators)
        return dict(sorted(counts.items()))


class TorchSession:
    """A loaded model: (B, C, H, W[, D]) float32 in, logits (B, K[, H, W, D]) float32 out."""

    def __init__(self, program: Any, device: str) -> None:
        from torch.export.passes import move_to_device_pass

        self._device = device
        self._module = move_to_device_pass(program, device).module(check_guards=False)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Run one batch; the copy back to the host waits for the device."""
        import torch

        with torch.inference_mode():
            return self._module(torch.from_numpy(images).to(self._device)).cpu().numpy()


def _load(artifact: Artifact) -> Any:
    import torch

    for module in artifact.imports:
        importlib.import_module(module)
    return torch.export.load(artifact.path)
