"""A run's verdict in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def summarise_verdict(
    *,
    budgets: Sequence[Mapping[str, Any]],
    safety: str,
    parity: str,
    quantization: str = "",
    gain: str = "",
    unmeasured: Sequence[str] = (),
) -> str:
    """What fits, what does not and what is not known.

    Args:
        budgets: rows with `name`, `runtime`, `limit`, `value`, `unit` and `verdict`, which is
            "fits", "missed" or "unknown".
        safety: "PASS", "FAIL", "INCONCLUSIVE" or "not compared".
        parity: "PASS", "FAIL" or "INCONCLUSIVE".
        quantization: what became of 8-bit arithmetic, in words; "" where none was asked for.
        gain: where compression made nothing smaller or faster, in words; see `describe_gain`.
        unmeasured: the runtimes on which the deployed model failed.

    >>> summarise_verdict(budgets=[], safety="PASS", parity="PASS")
    'No budget is set; safety against the uncompressed model: PASS; parity with torch: PASS.'
    """
    failed = f"the deployed model could not be measured on {', '.join(unmeasured)}"
    parts = [
        summarise_budgets(budgets),
        *([failed] if unmeasured else []),
        "no compressed model to compare"
        if safety == "not compared"
        else f"safety against the uncompressed model: {safety}",
        f"parity with torch: {parity}",
        *(text for text in (quantization, gain) if text),
    ]
    return f"{'; '.join(parts)}."


def worst_of(verdicts: Iterable[str], *, is_complete: bool, nothing: str) -> str:
    """The gravest verdict; where something was not judged, at best "INCONCLUSIVE".

    >>> worst_of(["PASS"], is_complete=False, nothing="not compared")
    'INCONCLUSIVE'

    Args:
        verdicts: of the runtimes.
        is_complete: whether they are of all runtimes.
        nothing: what is said where there was nothing to judge.
    """
    known = {*verdicts, *(() if is_complete else ("INCONCLUSIVE",))}
    return next((each for each in ("FAIL", "INCONCLUSIVE", "PASS") if each in known), nothing)


def describe_arithmetic(
    precisions: Iterable[str], operators: Mapping[str, Mapping[str, int]]
) -> str:
    """Whether a graph of 8-bit integers is computed in 8 bits by every runtime.

    Args:
        precisions: of the deployed artifacts.
        operators: candidate -> operators of the graph as its runtime optimised it, and how many;
            those in 8 bits begin with "int8:".

    Returns:
        How many there are on each runtime, or where there are none; "" where nothing is to be in
        8 bits or no graph could be read.
    """
    counts = {
        candidate: sum(n for name, n in found.items() if name.startswith("int8:"))
        for candidate, found in operators.items()
        if "/" not in candidate
    }
    if "int8" not in precisions or not counts:
        return ""
    without = [runtime for runtime, count in counts.items() if count == 0]
    if without:
        return f"not really INT8 on {', '.join(without)}: no operator computes in 8 bits"
    shown = ", ".join(f"{count} on {runtime}" for runtime, count in counts.items())
    return f"operators in 8 bits: {shown}"


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
