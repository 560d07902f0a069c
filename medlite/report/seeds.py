"""Runs that differ in their seed alone, as one row: means and their intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

from medlite.report.comparison import ComparisonRow, mark_pareto
from medlite.report.lookup import number

AVERAGED = (
    *("metric", "over_control", "rare_sensitivity", "ece", "params", "gmacs"),
    *("p50_ms", "p90_ms", "baseline_p50_ms", "levelled_p50_ms", "speedup"),
    *("size_kib", "peak_mib", "int8_operators"),
)


@dataclass(frozen=True, kw_only=True)
class SeedSummary:
    """One recipe on one runtime.

    row: the means over the seeds, and the verdicts counted ("2 PASS, 1 FAIL").
    half_widths: of the 95 % intervals of the means (Student's t), None from a single seed.
    deviations: standard deviations over the seeds, likewise.
    """

    row: ComparisonRow
    num_seeds: int
    half_widths: Mapping[str, float | None]
    deviations: Mapping[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with `<column>_half_width` and `<column>_sd`."""
        widths = {f"{name}_half_width": width for name, width in self.half_widths.items()}
        deviations = {f"{name}_sd": each for name, each in self.deviations.items()}
        return {**asdict(self.row), "num_seeds": self.num_seeds, **widths, **deviations}

    def text(self, column: str) -> str:
        """A mean with its half width, "-" where a run lacks it."""
        value, width = getattr(self.row, column), self.half_widths.get(column)
        if value is None or value == ():
            return "-"
        if isinstance(value, tuple):
            return ", ".join(value)
        if not isinstance(value, float):
            return str(value)
        return number(value) if not width else f"{number(value)} \u00b1 {number(width)}"


def summarise_seeds(rows: Iterable[ComparisonRow]) -> list[SeedSummary]:
    """One summary for each group of rows of the same settings, in the order of their first runs.

    A ranking of rows with one seed says nothing of another seed; `num_seeds` is there to tell.
    """
    groups: dict[tuple[str, ...], list[ComparisonRow]] = defaultdict(list)
    for row in rows:
        groups[row.runtime, row.machine, row.dataset, row.model, row.settings].append(row)
    distinct = [_one_a_seed(group) for group in groups.values()]
    marked = mark_pareto([_averaged(group) for group in distinct])
    return [
        SeedSummary(
            row=row,
            num_seeds=len(group),
            half_widths={name: half_width(values) for name, values in _columns(group)},
            deviations={name: deviation(values) for name, values in _columns(group)},
        )
        for row, group in zip(marked, distinct, strict=True)
    ]


def _one_a_seed(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """The last run of each seed: a run that was repeated is no second sample."""
    return list({row.seed: row for row in rows}.values())


def _averaged(rows: Sequence[ComparisonRow]) -> ComparisonRow:
    means: dict[str, Any] = {
        name: mean(values) if values else None for name, values in _columns(rows)
    }
    return replace(
        rows[0],
        **means,
        safety=_tally([row.safety for row in rows]),
        failed=_counted([name for row in rows for name in row.failed], len(rows)),
        budgets=_tally([row.budgets for row in rows]),
        seed=rows[0].seed if len(rows) == 1 else None,
    )


def _tally(verdicts: Sequence[str]) -> str:
    """The verdict of one seed, those of several counted."""
    if len(verdicts) == 1:
        return verdicts[0]
    return ", ".join(f"{count} {verdict}" for verdict, count in Counter(verdicts).most_common())


def _counted(names: Sequence[str], num_rows: int) -> tuple[str, ...]:
    """The most frequent first, with how many seeds each was in."""
    if num_rows == 1:
        return tuple(names)
    return tuple(f"{count} {name}" for name, count in Counter(names).most_common())


def _columns(rows: Sequence[ComparisonRow]) -> Iterable[tuple[str, list[float]]]:
    """Each column's values, none where a run lacks one."""
    for name in AVERAGED:
        values = [float(v) for row in rows if (v := getattr(row, name)) is not None]
        yield name, values if len(values) == len(rows) else []


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % interval of a mean, by Student's t; None of fewer than two values.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    spread = deviation(values)
    if spread is None:
        return None
    return float(t.ppf(0.975, len(values) - 1)) * spread / len(values) ** 0.5


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None of fewer than two values."""
    return stdev(values) if len(values) > 1 else None
