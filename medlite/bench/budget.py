"""Does what was measured fit the budgets of a device?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from medlite.bench.benchmark import NOT_ON_TARGET
from medlite.types import Hardware, Measurement


@dataclass(frozen=True, kw_only=True)
class BudgetVerdict:
    """One budget of a device against one runtime's measurement."""

    name: str
    """of the budget, such as "max_latency_p90_ms" """
    runtime: str
    limit: float
    value: float | None
    """in `unit`; None where it was not measured"""
    unit: str
    verdict: Literal["fits", "missed", "unknown"]
    margin: str
    """by how much, or why it is unknown"""


@dataclass(frozen=True, kw_only=True)
class _Budget:
    name: str
    measurement: str
    unit: str
    scale: float = 1.0
    """from the measurement's unit to the budget's"""


_BUDGETS = (
    _Budget(name="max_latency_p90_ms", measurement="latency/{}/p90_ms", unit="ms"),
    _Budget(name="max_peak_memory_mib", measurement="memory/{}/peak_mib", unit="MiB"),
    _Budget(name="max_size_mib", measurement="size/{}/disk_kib", unit="MiB", scale=1 / 1024),
    _Budget(name="max_energy_mj", measurement="energy/{}/net_mj_per_image", unit="mJ"),
)


def judge_budgets(
    measurements: Iterable[Measurement], runtimes: Sequence[str], hardware: Hardware
) -> list[BudgetVerdict]:
    """A verdict for every budget that `hardware` sets, on every runtime.

    Args:
        measurements: of the deployed model.
        runtimes: names as they stand in the measurements.
        hardware: budgets that are None are not judged.
    """
    by_name = {measurement.name: measurement for measurement in measurements}
    return [
        _judge(budget, limit, runtime, by_name, hardware)
        for budget, limit in _limits(hardware)
        for runtime in runtimes
    ]


def _limits(hardware: Hardware) -> Iterator[tuple[_Budget, float]]:
    for budget in _BUDGETS:
        limit = getattr(hardware, budget.name)
        if limit is not None:
            yield budget, limit


def _judge(
    budget: _Budget,
    limit: float,
    runtime: str,
    by_name: dict[str, Measurement],
    hardware: Hardware,
) -> BudgetVerdict:
    name = budget.measurement.format(runtime)
    measurement = by_name.get(name)
    value = None
    verdict: Literal["fits", "missed", "unknown"] = "unknown"
    margin = f"{name} was not measured"
    if measurement is not None and measurement.value is None:
        margin = measurement.note
    elif measurement is not None and measurement.value is not None:
        value = measurement.value * budget.scale
        verdict = "fits" if value <= limit else "missed"
        margin = _describe_margin(value, limit, budget.unit)
        if not hardware.is_this_machine and measurement.source == "measured":
            margin += f" ({NOT_ON_TARGET})"
    return BudgetVerdict(
        name=budget.name,
        runtime=runtime,
        limit=limit,
        value=value,
        unit=budget.unit,
        verdict=verdict,
        margin=margin,
    )


def _describe_margin(value: float, limit: float, unit: str) -> str:
    """Such as "12.3 MiB left (25%)" or "3.4 ms over (17%)"."""
    left = limit - value
    share = f" ({abs(left) / limit:.0%})" if limit > 0 else ""
    return f"{abs(left):.3g} {unit} {'left' if left >= 0 else 'over'}{share}"
