"""When a loss is small enough, too large, or not yet known: non-inferiority.

PASS when the whole 95 % interval of the loss lies below its margin, FAIL when it lies above,
INCONCLUSIVE otherwise (Piaggio et al. 2012, "Reporting of noninferiority and equivalence
randomized trials", JAMA 308). A bootstrap knows only the patients that it has, so it claims too
much where they are few or agree: hence `medlite.safety.resolution`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from medlite.safety.resolution import ONE_SIDED_LEVEL, Resolution
from medlite.safety.statistics import PairedLoss, holm

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True, kw_only=True)
class SafetyItem:
    """One score of both models, and whether the loss is within its margin."""

    name: str
    baseline: float | None
    compressed: float | None
    difference: float | None
    """how much worse the compressed model is; negative where it is better"""
    interval: tuple[float, float] | None
    """95 %, of the difference"""
    margin: float | None
    verdict: Verdict
    note: str = ""
    p_value: float | None = None
    """of equal areas under the ROC curve (DeLong), corrected over the classes (Holm)"""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to judge."""

    name: str
    paired: PairedLoss
    margin: float
    resolution: Resolution


def judge(question: Question, p_value: float) -> SafetyItem:
    """Decide one question; `p_value` is the (adjusted) one of the loss being within its margin."""
    paired, margin, resolution = question.paired, question.margin, question.resolution
    if math.isfinite(paired.first) and not math.isfinite(paired.second):
        return broken_item(question)
    interval = resolution.interval_of(paired)
    if interval is None or not math.isfinite(paired.loss):
        return undefined_item(question)
    item = SafetyItem(
        name=question.name,
        baseline=paired.first,
        compressed=paired.second,
        difference=paired.loss,
        interval=interval,
        margin=margin,
        verdict="INCONCLUSIVE",
    )
    if p_value < ONE_SIDED_LEVEL:
        return replace(item, verdict="FAIL", note=f"worse by more than the margin of {margin:g}")
    if interval[1] < margin and resolution.num_groups >= resolution.groups_to_pass(margin):
        return replace(item, verdict="PASS")
    return replace(item, note=what_it_needs(question, interval))


def judge_family(questions: Sequence[Question]) -> list[SafetyItem]:
    """Decide questions of one kind, such as the sensitivity of every class.

    FAIL needs a p value that survives Holm's correction, so that many classes do not fail by
    chance. PASS needs none: the family passes only if each of its members does
    (intersection-union test, Berger & Hsu 1996).
    """
    p_values = holm([one.resolution.p_value(one.paired, one.margin) for one in questions])
    return [judge(*pair) for pair in zip(questions, p_values, strict=True)]


def broken_item(question: Question) -> SafetyItem:
    """A score that the uncompressed model has, and the compressed one, on the same images, not."""
    return SafetyItem(
        name=question.name,
        baseline=question.paired.first,
        compressed=None,
        difference=None,
        interval=None,
        margin=question.margin,
        verdict="FAIL",
        note="the compressed model has no score: its outputs are not finite",
    )


def undefined_item(question: Question) -> SafetyItem:
    """A score that the split is too poor to have."""
    resolution = question.resolution
    found = f"{resolution.num_groups} {resolution.group_kind}"
    needed = resolution.groups_to_pass(question.margin)
    how_many = f"; needs n >= {needed}" if resolution.num_groups < needed else ""
    return SafetyItem(
        name=question.name,
        baseline=None,
        compressed=None,
        difference=None,
        interval=None,
        margin=question.margin,
        verdict="INCONCLUSIVE",
        note=f"not defined on this split ({found}){how_many}",
    )


def what_it_needs(question: Question, interval: tuple[float, float]) -> str:
    """How many groups would settle the question if the loss stayed as it is."""
    loss, margin, resolution = question.paired.loss, question.margin, question.resolution
    if loss == margin:
        return "the difference equals its margin"
    needed = resolution.groups_to_settle(question.paired, interval, margin)
    needed = max(needed, resolution.num_groups + 1)
    side = "to pass" if loss < margin else "to fail"
    return f"needs n >= {needed:,} {side}; has {resolution.num_groups:,} {resolution.group_kind}"


def worst(items: Sequence[SafetyItem]) -> Verdict:
    """FAIL before INCONCLUSIVE before PASS."""
    verdicts = {item.verdict for item in items}
    order: tuple[Verdict, ...] = ("FAIL", "INCONCLUSIVE")
    return next((verdict for verdict in order if verdict in verdicts), "PASS")
