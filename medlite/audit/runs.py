"""Metrics that finished runs have measured, to hold claims against."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from medlite.audit.claims import Claim
from medlite.report.result import FILE_NAME, RunResult, read_result

LEAST_SEEDS = 3
"""from so many seeds on, a claim inside the interval counts as reproduced"""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A metric of the uncompressed model over all runs that were found."""

    values: tuple[float, ...]
    """one a seed"""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.values)

    @property
    def half_width(self) -> float:
        """Of the 95 % interval of the mean by Student's t; infinite for one seed."""
        n = len(self.values)
        if n < 2:
            return math.inf
        return float(student_t.ppf(0.975, n - 1)) * statistics.stdev(self.values) / math.sqrt(n)

    def holds(self, claimed: float) -> bool | None:
        """Whether the claim lies inside the interval; None with too few seeds to say."""
        if len(self.values) < LEAST_SEEDS:
            return None
        return abs(self.mean - claimed) <= self.half_width

    def __str__(self) -> str:
        n = len(self.values)
        if n < LEAST_SEEDS:
            return f"{n} seed{'s' * (n > 1)}: {LEAST_SEEDS} are needed to call it reproduced"
        return f"mean of {n} seeds, 95 % +- {self.half_width:.3f}"


def find_evidence(claim: Claim, directories: Sequence[Path]) -> Evidence | None:
    """What the runs below `directories` say of a metric of an uncompressed model, None if nothing.

    A run counts if model, dataset and the values of `claim.where` are those of the claim; of
    several with one seed the newest. The metric is that of torch's output.

    Raises:
        RecordError: a result cannot be read.
    """
    newest: dict[int, tuple[str, float]] = {}
    for path in sorted(p for directory in directories for p in directory.rglob(FILE_NAME)):
        result = read_result(path)
        value = _uncompressed(result, claim.metric)
        if value is None or not _is_meant(result, claim):
            continue
        seed = int(result.config["seed"])
        newest[seed] = max(newest.get(seed, ("", 0.0)), (result.created_at, value))
    if not newest:
        return None
    return Evidence(values=tuple(value for _, value in newest.values()))


def _is_meant(result: RunResult, claim: Claim) -> bool:
    names = (result.choices.get("model"), result.dataset["name"])
    return names == (claim.model, claim.dataset) and all(
        _value_at(result.config, key) == value for key, value in claim.where.items()
    )


def _value_at(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _uncompressed(result: RunResult, metric: str) -> float | None:
    prefix = "test" if result.choices.get("compression", "none") == "none" else "baseline/test"
    return next((m.value for m in result.measurements if m.name == f"{prefix}/{metric}"), None)
