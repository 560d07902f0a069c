"""Runs as rows of one table, and which of them are Pareto-optimal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any

from medlite.errors import MedliteError, did_you_mean
from medlite.metrics.names import class_keys
from medlite.report.lookup import Lookup
from medlite.report.result import RunResult
from medlite.report.sameness import images_digest, net_digest, settings_digest
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
    baseline_p50_ms: float | None
    """of the uncompressed net, in turns with the compressed one"""
    speedup: float | None
    size_kib: float | None
    peak_mib: float | None
    int8_operators: float | None
    safety: str
    failed: tuple[str, ...]
    """what the gate failed, such as "sensitivity drop/nodule" """
    budgets: str
    seed: int | None
    settings: str
    """the same for runs that differ in their seed alone"""
    images: str
    """the same for runs that saw the same images"""
    net: str
    """the same where the uncompressed nets must be equally fast"""
    levelled_p50_ms: float | None = None
    """see `level_latencies`"""
    is_pareto: bool = False


BETTER_HIGH = {"metric", "over_control", "rare_sensitivity", "speedup", "int8_operators"}
COLUMNS = tuple(each.name for each in fields(ComparisonRow))


def rows_of(result: RunResult) -> list[ComparisonRow]:
    """One row for each runtime of a run."""
    found = Lookup(result.measurements)
    return [row_of(result, found, runtime) for runtime in found.runtimes()]


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
        machine=machine_of(result),
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
        baseline_p50_ms=measured(found.of("latency", f"baseline/{runtime}", "p50_ms")),
        speedup=measured(found.get(f"speedup/{runtime}/ratio")),
        size_kib=measured(found.of("size", runtime, "disk_kib")),
        peak_mib=measured(found.of("memory", runtime, "peak_mib")),
        int8_operators=measured(found.get(f"operators/{runtime}/int8_count")),
        safety=gate["verdict"] if gate else "not compared",
        failed=failed_items(gate) if gate else (),
        budgets=worst_budget(budgets),
        seed=result.config.get("seed"),
        settings=settings_digest(result, runtime),
        images=images_digest(result),
        net=net_digest(result, runtime),
    )


def gain_over_control(result: RunResult, runtime: str) -> float | None:
    """The deployed model's metric less that of the control; None where there is none."""
    for item in result.control.get(runtime, {}).get("items", ()):
        if item["name"] == "safety/metric_drop" and item["difference"] is not None:
            return 0.0 - float(item["difference"])
    return None


def failed_items(gate: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a safety report's items that failed."""
    names = (item["name"] for item in gate["items"] if item["verdict"] == "FAIL")
    return tuple(name.removeprefix("safety/").replace("_", " ") for name in names)


def machine_of(result: RunResult) -> str:
    """The processor, and the accelerator where that is what ran."""
    is_cuda = result.config.get("hardware", {}).get("device") == "cuda"
    parts = [result.environment.get("cpu"), result.environment.get("gpu") if is_cuda else None]
    return " + ".join(str(part) for part in parts if part)


def rarest_class(dataset: Mapping[str, Any]) -> tuple[str, str]:
    """Its name, and that of the measurement of its sensitivity."""
    names, counts = dataset["class_names"], dataset["class_counts"]
    first = 1 if dataset["task"] == "segmentation" else 0
    position = min(range(first, len(names)), key=counts.__getitem__)
    return names[position], f"sensitivity/{class_keys(names)[position]}"


def measured(measurement: Measurement | None) -> float | None:
    """Only what was measured stands in a ranking, never an estimate."""
    is_measured = measurement is not None and measurement.source == "measured"
    return measurement.value if is_measured and measurement is not None else None


def level_latencies(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """Put the medians of one net and its compressed selves on one footing.

    They were taken at different times, beside whatever else the machine did, but for those of one
    run, whose queries came in turns. So each is the median of all that the uncompressed net took
    in these runs, divided by the run's own speed-up; its own where there is no speed-up.
    """
    uncompressed: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        own = row.p50_ms if _is_uncompressed(row) else row.baseline_p50_ms
        if own is not None:
            uncompressed[row.net, row.machine].append(own)
    return [
        replace(row, levelled_p50_ms=_levelled(row, uncompressed[row.net, row.machine]))
        for row in rows
    ]


def _levelled(row: ComparisonRow, uncompressed: Sequence[float]) -> float | None:
    if row.p50_ms is None:
        return None
    speedup = 1.0 if _is_uncompressed(row) else row.speedup
    return median(uncompressed) / speedup if uncompressed and speedup else row.p50_ms


def _is_uncompressed(row: ComparisonRow) -> bool:
    """By its name, which may end in what else it sets: "none (train.epochs=5)"."""
    return row.compression.partition(" ")[0] == "none"


def mark_pareto(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """Mark the rows that no other row of the same images, hardware and machine beats.

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
    return row.images, row.metric_name, row.hardware, row.machine


def goals(row: ComparisonRow) -> tuple[float, ...] | None:
    """What to minimise; None where one of them was not measured."""
    found = (row.metric, row.levelled_p50_ms, row.size_kib, row.peak_mib)
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
