"""When a loss is small enough, too large, or not yet known: non-inferiority.

PASS when the whole 95 % interval of the loss lies below its margin, FAIL when it lies above,
INCONCLUSIVE otherwise (Piaggio et al. 2012, "Reporting of noninferiority and equivalence
randomized trials", JAMA 308). A bootstrap knows only the patients that it has, so it claims too
much where they are few or agree: hence `Resolution`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from medlite.safety.statistics import PairedLoss, holm

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]

ONE_SIDED_LEVEL = 0.025
MIN_GROUPS = 20
"""percentile intervals of fewer groups are too narrow to pass anything"""


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
class Resolution:
    """The least that so many groups can tell, whatever the bootstrap says.

    num_groups: groups that the score rests on. group_kind: what they are, in words.
    is_proportion: each group is a yes or no (found or missed). Then n groups without a loss
    cannot rule out losses below 1 - 0.025^(1/n) (the exact binomial bound, "rule of three"),
    and n losses out of n come by chance with margin^n. For other scores, fewer than
    MIN_GROUPS groups never pass, and all of them fall to one side by chance with 0.5^n.
    """

    num_groups: int
    group_kind: str
    is_proportion: bool

    def widen(self, interval: tuple[float, float]) -> tuple[float, float]:
        """Raise an interval's end to the least loss that the groups can rule out."""
        if not self.is_proportion:
            return interval
        return interval[0], max(interval[1], 1 - ONE_SIDED_LEVEL ** (1 / self.num_groups))

    def groups_to_pass(self, margin: float) -> int:
        """How many groups it takes before anything can pass."""
        if not self.is_proportion:
            return MIN_GROUPS
        return math.ceil(math.log(ONE_SIDED_LEVEL) / math.log1p(-margin))

    def p_value(self, paired: PairedLoss, margin: float) -> float:
        """One-sided p value of "the loss is at most its margin"."""
        known = paired.samples[np.isfinite(paired.samples)]
        by_bootstrap = (1 + np.count_nonzero(known <= margin)) / (1 + len(known))
        by_chance = (margin if self.is_proportion else 0.5) ** self.num_groups
        return max(by_bootstrap, by_chance)


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
    bootstrapped = paired.interval
    if bootstrapped is None or not math.isfinite(paired.loss):
        return undefined_item(question)
    item = SafetyItem(
        name=question.name,
        baseline=paired.first,
        compressed=paired.second,
        difference=paired.loss,
        interval=resolution.widen(bootstrapped),
        margin=margin,
        verdict="INCONCLUSIVE",
    )
    if p_value < ONE_SIDED_LEVEL:
        return replace(item, verdict="FAIL", note=f"worse by more than the margin of {margin:g}")
    if bootstrapped[1] < margin and resolution.num_groups >= resolution.groups_to_pass(margin):
        return replace(item, verdict="PASS")
    return replace(item, note=what_it_needs(question, bootstrapped))


def judge_family(questions: Sequence[Question]) -> list[SafetyItem]:
    """Decide questions of one kind, such as the sensitivity of every class.

    FAIL needs a p value that survives Holm's correction, so that many classes do not fail by
    chance. PASS needs none: the family passes only if each of its members does
    (intersection-union test, Berger & Hsu 1996).
    """
    p_values = holm([one.resolution.p_value(one.paired, one.margin) for one in questions])
    return [judge(*pair) for pair in zip(questions, p_values, strict=True)]


def undefined_item(question: Question) -> SafetyItem:
    """A score that the split is too poor to have."""
    resolution = question.resolution
    found = f"{resolution.num_groups} {resolution.group_kind}"
    needed = resolution.groups_to_pass(question.margin)
    return SafetyItem(
        name=question.name,
        baseline=None,
        compressed=None,
        difference=None,
        interval=None,
        margin=question.margin,
        verdict="INCONCLUSIVE",
        note=f"not defined on this split ({found}); needs n >= {needed}",
    )


def what_it_needs(question: Question, interval: tuple[float, float]) -> str:
    """How many groups would settle the question if the loss stayed as it is.

    The width of the bootstrap's interval shrinks with the root of n.
    """
    loss, margin, resolution = question.paired.loss, question.margin, question.resolution
    if loss == margin:
        return "the difference equals its margin"
    nearer_end = interval[1] if loss < margin else interval[0]
    growth = ((nearer_end - loss) / (margin - loss)) ** 2
    needed = max(math.ceil(resolution.num_groups * growth), resolution.num_groups + 1)
    if loss < margin:
        needed = max(needed, resolution.groups_to_pass(margin))
    side = "to pass" if loss < margin else "to fail"
    return f"needs n >= {needed:,} {side}; has {resolution.num_groups:,} {resolution.group_kind}"


def worst(items: Sequence[SafetyItem]) -> Verdict:
    """FAIL before INCONCLUSIVE before PASS."""
    verdicts = {item.verdict for item in items}
    order: tuple[Verdict, ...] = ("FAIL", "INCONCLUSIVE")
    return next((verdict for verdict in order if verdict in verdicts), "PASS")
