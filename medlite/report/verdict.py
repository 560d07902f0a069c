"""A run's verdict in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def summarise_verdict(
    *, budgets: Sequence[Mapping[str, Any]], safety: str, parity: str, quantization: str = ""
) -> str:
    """What fits, what does not and what is not known.

    Args:
        budgets: rows with `name`, `runtime`, `limit`, `value`, `unit`, `verdict`.
        safety: "PASS", "FAIL", "INCONCLUSIVE" or "not compared".
        parity: "PASS" or "FAIL".
        quantization: what became of 8-bit arithmetic, in words; "" where none was asked for.

    >>> summarise_verdict(budgets=[], safety="PASS", parity="PASS")
    'No budget is set; safety against the uncompressed model: PASS; parity with torch: PASS.'
    """
    parts = [
        summarise_budgets(budgets),
        "no compressed model to compare"
        if safety == "not compared"
        else f"safety against the uncompressed model: {safety}",
        f"parity with torch: {parity}",
        *([quantization] if quantization else []),
    ]
    return f"{'; '.join(parts)}."


def summarise_budgets(budgets: Sequence[Mapping[str, Any]]) -> str:
    """Which budgets are met, and by how much the others are missed."""
    if not budgets:
        return "No budget is set"
    missed = [row for row in budgets if row["verdict"] == "FAIL"]
    unknown = [row for row in budgets if row["verdict"] not in ("FAIL", "PASS")]
    if missed:
        misses = ", ".join(
            f"{row['name']} on {row['runtime']} ({row['value']:.3g} of {row['limit']:g} "
            f"{row['unit']})"
            for row in missed
        )
        return f"Misses {misses}"
    if unknown:
        return f"{len(budgets) - len(unknown)} of {len(budgets)} budgets are met, the others open"
    return f"Meets all {len(budgets)} budgets"
