"""A run's verdict in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def summarise_verdict(
    *, budgets: Sequence[Mapping[str, Any]], safety: str, parity: str, quantization: str = ""
) -> str:
    """What fits, what does not and what is not known.

    Args:
        budgets: rows with `name`, `runtime`, `limit`, `value`, `unit` and `verdict`, which is
            "fits", "missed" or "unknown".
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
    missed = [row for row in budgets if row["verdict"] == "missed"]
    num_unknown = sum(row["verdict"] == "unknown" for row in budgets)
    if missed:
        misses = ", ".join(
            f"{row['name'].removeprefix('max_')} on {row['runtime']} "
            f"({row['value']:.3g} of {row['limit']:g} {row['unit']})"
            for row in missed
        )
        return f"Misses {misses}"
    if num_unknown:
        met = len(budgets) - num_unknown
        return f"Meets {met} of {len(budgets)} budgets, {num_unknown} could not be judged"
    return f"Meets all {len(budgets)} budgets"


def worst_budget(budgets: Iterable[Mapping[str, Any]]) -> str:
    """The first of "missed", "unknown", "fits" that occurs, or "none set"."""
    verdicts = {row["verdict"] for row in budgets}
    return next((each for each in ("missed", "unknown", "fits") if each in verdicts), "none set")
