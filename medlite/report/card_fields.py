"""Lines of the deployment card, one constructor for each provenance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from medlite.report.lookup import interval, quantity
from medlite.report.result import CardField
from medlite.types import Measurement


def declared(label: str, value: Any, note: str = "") -> CardField:
    """What a configuration or a dataset's author said."""
    return CardField(label=label, value=str(value), provenance="declared", note=note)


def observed(label: str, value: Any, note: str = "") -> CardField:
    """What the run itself saw."""
    return CardField(label=label, value=str(value), provenance="measured", note=note)


def unavailable(label: str, reason: str) -> CardField:
    """What could not be had."""
    return CardField(label=label, value="unavailable", provenance="unavailable", note=reason)


def known(label: str, value: Any, reason: str, note: str = "") -> CardField:
    """Observed where the machine says it, unavailable otherwise."""
    is_known = value not in (None, "", {}, [])
    return observed(label, value, note) if is_known else unavailable(label, reason)


def measured(label: str, measurement: Measurement | None, missing: str) -> CardField:
    """A measurement with its interval."""
    if measurement is None:
        return unavailable(label, missing)
    if measurement.value is None:
        return unavailable(label, measurement.note)
    spread = interval(measurement)
    value = f"{quantity(measurement)} ({spread})" if spread else quantity(measurement)
    count = f"n = {measurement.n}" if measurement.n is not None else ""
    note = "; ".join(part for part in (count, measurement.note) if part)
    return CardField(label=label, value=value, provenance=measurement.source, note=note)


def shape(sizes: Iterable[int]) -> str:
    """Sizes along the axes of an image."""
    return " x ".join(str(size) for size in sizes)
