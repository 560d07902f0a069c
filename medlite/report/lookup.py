"""Measurements as people read them, and where to find them in a result."""

from __future__ import annotations

import math
from collections.abc import Iterable

from medlite.types import Measurement


def number(value: float) -> str:
    """Three significant digits, more for large numbers, whole numbers whole.

    >>> [number(v) for v in (0.93651, 12.345, 99.96, 49457.3, 20.0, 0.00012, float("nan"))]
    ['0.937', '12.3', '100', '49,457', '20', '0.000120', 'nan']
    """
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def quantity(measurement: Measurement | None) -> str:
    """Value and unit, or a dash."""
    if measurement is None or measurement.value is None:
        return "-"
    return f"{number(measurement.value)} {measurement.unit}".strip()


def interval(measurement: Measurement | None) -> str:
    """Lower and upper end, or nothing."""
    if measurement is None or measurement.spread is None:
        return ""
    return " to ".join(number(end) for end in measurement.spread)


class Lookup:
    """Measurements by what they are about."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self.by_name = {measurement.name: measurement for measurement in measurements}

    def get(self, name: str) -> Measurement | None:
        """The measurement of exactly this name."""
        return self.by_name.get(name)

    def score(self, name: str, candidate: str) -> Measurement | None:
        """A test score of a candidate: on its runtime's own output where there is one.

        Args:
            name: such as "dice" or "sensitivity/malignant".
            candidate: "onnxruntime", "baseline/onnxruntime" ...
        """
        prefix, runtime = split_candidate(candidate)
        own = self.by_name.get(f"{prefix}test/{runtime}/{name}")
        return own or self.by_name.get(f"{prefix}test/{name}")

    def of(self, kind: str, candidate: str, name: str) -> Measurement | None:
        """A benchmark figure of a candidate, such as ("latency", "openvino", "p50_ms")."""
        prefix, runtime = split_candidate(candidate)
        return self.by_name.get(f"{prefix}{kind}/{runtime}/{name}")

    def runtimes(self) -> list[str]:
        """The runtimes that the deployed model was measured on, or failed on."""
        parts = [name.split("/") for name in self.by_name if name.startswith("latency/")]
        return list(dict.fromkeys(part[1] for part in parts))

    def candidates(self) -> list[str]:
        """Deployed models and, before each, its baseline where there is one."""
        found = []
        for runtime in self.runtimes():
            if f"baseline/latency/{runtime}/p50_ms" in self.by_name:
                found.append(f"baseline/{runtime}")
            found.append(runtime)
        return found


def split_candidate(candidate: str) -> tuple[str, str]:
    """Split "baseline/openvino" into ("baseline/", "openvino")."""
    prefix, slash, runtime = candidate.rpartition("/")
    return prefix + slash, runtime
