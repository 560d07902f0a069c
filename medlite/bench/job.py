"""What a measuring process is told: plain values that fit in a JSON file.

Only the standard library is imported here, since the process must import as little as it can.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from medlite.errors import BenchmarkError
from medlite.types import Artifact, Hardware, Runtime


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model in one runtime on one hardware, with the images to feed it."""

    runtime: Runtime
    artifact: Artifact | None
    """None: load the engine without a model, the reference for memory"""
    hardware: Hardware
    images: Path
    """a .npy file, (N, C, H, W[, D]) float32"""

    def write(self, path: Path) -> None:
        """Write this job as JSON."""
        plain = {
            "runtime": _describe_runtime(self.runtime),
            "artifact": self.artifact and self.artifact.to_json(),
            "hardware": asdict(self.hardware),
            "images": str(self.images),
        }
        path.write_text(json.dumps(plain), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """The inverse of `write`; imports the module of the runtime."""
        plain = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            runtime=_build_runtime(plain["runtime"]),
            artifact=plain["artifact"] and Artifact.from_json(plain["artifact"]),
            hardware=Hardware(**plain["hardware"]),
            images=Path(plain["images"]),
        )


def _describe_runtime(runtime: Any) -> dict[str, Any]:
    kind = type(runtime)
    if kind.__module__ == "__main__":
        message = (
            f"the runtime {kind.__qualname__} is defined in the script that runs; move it to a "
            "module that a measuring process can import"
        )
        raise BenchmarkError(message)
    options = {field.name: getattr(runtime, field.name) for field in fields(runtime) if field.init}
    return {"module": kind.__module__, "name": kind.__qualname__, "options": options}


def _build_runtime(plain: Mapping[str, Any]) -> Runtime:
    kind = getattr(importlib.import_module(plain["module"]), plain["name"])
    return kind(**plain["options"])
