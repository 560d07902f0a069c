"""Runs as rows of one table, and which of them are Pareto-optimal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from medlite.errors import MedliteError, did_you_mean
from medlite.metrics.names import class_keys
from medlite.report.lookup import Lookup
from medlite.report.result import RunResult
from medlite.report.verdict import worst_budget
from medlite.types import Measurement


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One run on one runtime; None where a number was not measured."""

    run: str
    dataset: str
    model: str
    compression: str
    runtime: str
    hardware: str
    machine: str
    metric_name: str
    metric: float | None
    over_control: float | None
    """by how much the metric is above that of a float net that trained on for as long"""
    rarest_class: str
    """the one with the fewest training images (pixels), the background of a mask aside"""
    rare_sensitivity: float | None
    ece: float | None
    params: float | None
    gmacs: float | None
    p50_ms: float | None
    p90_ms: float | None
    speedup: float | None
    size_kib: float | None
    peak_mib: float | None
    int8_operators: float | None
    safety: str
    budgets: str
    seed: int | None
    settings: str
    """the same for runs that differ in their seed alone"""
    is_pareto: bool = False


BETTER_HIGH = {"metric", "over_control", "rare_sensitivity", "speedup", "int8_operators"}
COLUMNS = tuple(each.name for each in fields(ComparisonRow))


def rows_of(result: RunResult) -> list[ComparisonRow]:
    """One row for each runtime of a run."""
    found = Lookup(result.measurements)
    return [row_of(result, found, runtime) for runtime in found.runtimes()]


def tell_apart(results: Sequence[RunResult]) -> list[str]:
    """Each run's compression, with the options that runs of the same steps do not share.

    One of runs with sparsities of 0.5 and 0.9 is "sparsify (sparsity=0.5)".
    """
    options = [_options_of(result) for result in results]
    labels = []
    for result, own in zip(results, options, strict=True):
        alike = [other for other in options if other.keys() == own.keys()]
        varied = [key for key in own if any(other[key] != own[key] for other in alike)]
        has_one_step = len({key.partition(".")[0] for key in own}) == 1
        shown = [f"{key.partition('.')[2] if has_one_step else key}={own[key]}" for key in varied]
        steps = result.choices.get("compression", "none")
        labels.append(f"{steps} ({', '.join(shown)})" if shown else steps)
    return labels


def _options_of(result: RunResult) -> dict[str, Any]:
    """Options of the compression, such as "prune.ratio"."""
    steps: Mapping[str, Mapping[str, Any]] = result.config.get("compression", {})
    return {
        f"{step}.{key}": value
        for step, options in steps.items()
        for key, value in options.items()
        if key != "_target_"
    }


def row_of(result: RunResult, found: Lookup, runtime: str) -> ComparisonRow:
    """What a run says of one runtime."""
    choices = result.choices
    budgets = [row for row in result.verdict["budgets"] if row["runtime"] == runtime]
    gate = result.safety.get(runtime)
    rarest, sensitivity = rarest_class(result.dataset)
    return ComparisonRow(
        run=result.name,
        dataset=result.dataset["name"],
        model=choices.get("model", ""),
        compression=choices.get("compression", "none"),
        runtime=runtime,
        hardware=choices.get("hardware", "host"),
        machine=str(result.environment.get("cpu")),
        metric_name=result.primary_metric,
        metric=measured(found.score(result.primary_metric, runtime)),
        over_control=gain_over_control(result, runtime),
        rarest_class=rarest,
        rare_sensitivity=measured(found.score(sensitivity, runtime)),
        ece=measured(found.score("ece", runtime)),
        params=measured(found.get("complexity/params")),
        gmacs=measured(found.get("complexity/gmacs")),
        p50_ms=measured(found.of("latency", runtime, "p50_ms")),
        p90_ms=measured(found.of("latency", runtime, "p90_ms")),
        speedup=measured(found.get(f"speedup/{runtime}/ratio")),
        size_kib=measured(found.of("size", runtime, "disk_kib")),
        peak_mib=measured(found.of("memory", runtime, "peak_mib")),
        int8_operators=measured(found.get(f"operators/{runtime}/int8_count")),
        safety=gate["verdict"] if gate else "not compared",
        budgets=worst_budget(budgets),
        seed=result.config.get("seed"),
        settings=settings_digest(result.config),
    )


def gain_over_control(result: RunResult, runtime: str) -> float | None:
    """The deployed model's metric less that of the control; None where there is none."""
    for item in result.control.get(runtime, {}).get("items", ()):
        if item["name"] == "safety/metric_drop":
            return -item["difference"]
    return None


def rarest_class(dataset: Mapping[str, Any]) -> tuple[str, str]:
    """Its name, and that of the measurement of its sensitivity."""
    names, counts = dataset["class_names"], dataset["class_counts"]
    first = 1 if dataset["task"] == "segmentation" else 0
    position = min(range(first, len(names)), key=counts.__getitem__)
    return names[position], f"sensitivity/{class_keys(names)[position]}"


def settings_digest(config: Mapping[str, Any]) -> str:
    """6 hexadecimal digits of all that decides a row of a comparison but the seed."""
    elsewhere = {"seed", "name", "outputs", "logger", "stages"}
    elsewhere |= {"robustness", "shortcuts", "explainability"}
    decisive = {key: value for key, value in config.items() if key not in elsewhere}
    decisive["safety"] = {k: v for k, v in config.get("safety", {}).items() if k != "enforce"}
    canonical = json.dumps(decisive, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:6]


def measured(measurement: Measurement | None) -> float | None:
    """Only what was measured stands in a ranking, never an estimate."""
    is_measured = measurement is not None and measurement.source == "measured"
    return measurement.value if is_measured and measurement is not None else None


def mark_pareto(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """Mark the rows that no other row of the same dataset, hardware and machine beats.

    A row beats another if it is at least as good in metric, median latency, size and peak memory
    and better in one. A row that lacks one of the four neither beats nor is marked.
    """
    return [replace(row, is_pareto=is_optimal(row, rows)) for row in rows]


def is_optimal(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> bool:
    """Whether no other row is better in one respect and no worse in the others."""
    own = goals(row)
    if own is None:
        return False
    for other in rows:
        theirs = goals(other)
        if setting(other) != setting(row) or theirs is None or theirs == own:
            continue
        if all(a <= b for a, b in zip(theirs, own, strict=True)):
            return False
    return True


def setting(row: ComparisonRow) -> tuple[str, ...]:
    """What two rows must share to be ranked together."""
    return row.dataset, row.metric_name, row.hardware, row.machine


def goals(row: ComparisonRow) -> tuple[float, ...] | None:
    """What to minimise; None where one of them was not measured."""
    found = (row.metric, row.p50_ms, row.size_kib, row.peak_mib)
    known = [value for value in found if value is not None]
    return (-known[0], *known[1:]) if len(known) == len(found) else None


def sort_rows(rows: Sequence[ComparisonRow], key: str) -> list[ComparisonRow]:
    """The best first; rows without the number last.

    Raises:
        MedliteError: no such column.
    """
    if key not in COLUMNS:
        message = f"--sort {key}: no such column, {did_you_mean(key, COLUMNS)}"
        raise MedliteError(message)
    known = [row for row in rows if getattr(row, key) is not None]
    unknown = [row for row in rows if getattr(row, key) is None]
    known.sort(key=lambda row: getattr(row, key), reverse=key in BETTER_HIGH or key == "is_pareto")
    return [*known, *unknown]
