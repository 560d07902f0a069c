"""Peak memory of a model: the process that ran it, less one that only loaded the engine."""

from __future__ import annotations

from medlite.types import Measurement


def summarise(prefix: str, runtime: str, peak_kib: int, runtime_only_kib: int) -> list[Measurement]:
    """Both peaks and their difference.

    Args:
        prefix: "" or "baseline/", before every name.
        runtime: the runtime's name, inside every name.
        peak_kib: of the process that loaded the model and answered single queries.
        runtime_only_kib: of a process that imported the engine and loaded nothing.
    """
    values = {
        "peak_mib": (peak_kib, "Python, engine and model, after single queries"),
        "runtime_only_mib": (runtime_only_kib, "Python and engine, no model"),
        "model_mib": (peak_kib - runtime_only_kib, "peak less Python and engine"),
    }
    return [
        Measurement(
            name=f"{prefix}memory/{runtime}/{name}",
            value=kib / 1024,
            unit="MiB",
            n=1,
            higher_is_better=False,
            note=f"peak resident memory of a fresh process: {what}",
        )
        for name, (kib, what) in values.items()
    ]
