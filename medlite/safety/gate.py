"""The safety gate: is the compressed model good enough beside its uncompressed self?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from medlite.errors import ConfigError
from medlite.metrics.names import class_keys
from medlite.metrics.statistics import GroupedScores, grouped_scores
from medlite.metrics.task import primary_metric
from medlite.safety.flips import Flips, count_flips
from medlite.safety.judge import (
    Question,
    Resolution,
    SafetyItem,
    Verdict,
    judge_family,
    worst,
)
from medlite.safety.statistics import PairedLoss, paired_bootstrap

if TYPE_CHECKING:
    from medlite.types import DataSpec, Predictions, SafetyMargins

MIN_RESAMPLES = 500
"""fewer leave too little beyond the ends of a 95 % interval"""


@dataclass(frozen=True, kw_only=True)
class RarestClass:
    """The class with the fewest training images (or pixels): where compression hurts first."""

    name: str
    train_count: int
    test_count: int
    """test images that have it"""


class Check(NamedTuple):
    """One score, how much of it may be lost, and the class that it is about."""

    name: str
    score: str
    margin: float
    higher_is_better: bool
    position: int | None = None


@dataclass(frozen=True, kw_only=True)
class SafetyReport:
    """What the gate found; the verdict is that of the worst item."""

    items: tuple[SafetyItem, ...]
    verdict: Verdict
    num_groups: int
    group_kind: str
    num_resamples: int
    seed: int
    flips: Flips | None = None
    """None where outputs are not finite, like the rarest class"""
    rarest_class: RarestClass | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_models(
    baseline: Predictions,
    compressed: Predictions,
    spec: DataSpec,
    margins: SafetyMargins,
    *,
    seed: int = 0,
) -> SafetyReport:
    """Judge the losses of the task metric, calibration and each class's sensitivity.

    Items: `safety/metric_drop`, `safety/ece_increase`, `safety/nll_increase` and
    `safety/sensitivity_drop/<class>` (every class in classification; the foreground classes, over
    the pixels of resampled groups, in segmentation). Outputs that are equal bit by bit pass;
    otherwise an interval of no width is widened as `judge.Resolution` says, so that a class with
    few test patients is INCONCLUSIVE even if none of them was lost.

    Args:
        baseline: of the uncompressed model.
        compressed: of the compressed model, on the same samples in the same order.
        spec: the dataset.
        margins: how much worse it may be.
        seed: of the bootstrap.

    Raises:
        ConfigError: a margin that no experiment could show.
    """
    check_margins(margins)
    assert baseline.groups == compressed.groups, "both models must see the same samples"
    assert np.array_equal(baseline.targets, compressed.targets)
    broken = finite_item(baseline, compressed)
    if broken:
        return build_report((broken,), baseline, spec, margins, seed)
    before = grouped_scores(baseline, spec)
    checks = plan(spec, margins)
    if np.array_equal(baseline.logits, compressed.logits):
        items = tuple(identical_item(check, before) for check in checks)
    else:
        paired = paired_bootstrap(
            before.statistics,
            grouped_scores(compressed, spec).statistics,
            higher_is_better={check.score: check.higher_is_better for check in checks},
            num_groups=before.num_groups,
            num_resamples=margins.num_resamples,
            seed=seed,
        )
        items = judged_items(checks, paired, before, spec)
    report = build_report(items, baseline, spec, margins, seed)
    return replace(
        report,
        flips=count_flips(baseline, compressed, spec),
        rarest_class=rarest_class(spec, before),
    )


def build_report(
    items: tuple[SafetyItem, ...],
    baseline: Predictions,
    spec: DataSpec,
    margins: SafetyMargins,
    seed: int,
) -> SafetyReport:
    """Items with their verdict and how they were found."""
    return SafetyReport(
        items=items,
        verdict=worst(items),
        num_groups=len(set(baseline.groups)),
        group_kind=spec.group_kind,
        num_resamples=margins.num_resamples,
        seed=seed,
    )


def check_margins(margins: SafetyMargins) -> None:
    """Refuse margins that could never be met."""
    names = ("metric_drop", "sensitivity_drop", "ece_increase", "nll_increase")
    problems = [
        f"safety.{name}: {value:g} is not above 0: no number of patients shows a loss of nothing"
        for name in names
        if (value := getattr(margins, name)) <= 0
    ]
    if margins.sensitivity_drop >= 1:
        problems.append(f"safety.sensitivity_drop: {margins.sensitivity_drop:g} is not below 1")
    if margins.num_resamples < MIN_RESAMPLES:
        problems.append(
            f"safety.num_resamples: {margins.num_resamples} is below {MIN_RESAMPLES}, "
            "too few for a 95 % interval"
        )
    if problems:
        raise ConfigError(problems)


def plan(spec: DataSpec, margins: SafetyMargins) -> list[Check]:
    """What is judged for a dataset's task, the sensitivities last."""
    checks = [
        Check("safety/metric_drop", primary_metric(spec), margins.metric_drop, True),
        Check("safety/ece_increase", "ece", margins.ece_increase, False),
        Check("safety/nll_increase", "nll", margins.nll_increase, False),
    ]
    first = 1 if spec.task == "segmentation" else 0
    for position, key in list(enumerate(class_keys(spec.class_names)))[first:]:
        name, score = f"safety/sensitivity_drop/{key}", f"sensitivity/{key}"
        checks.append(Check(name, score, margins.sensitivity_drop, True, position))
    return checks


def finite_item(baseline: Predictions, compressed: Predictions) -> SafetyItem | None:
    """A failure where the compressed model's outputs are not numbers."""
    before, after = (
        int((~np.isfinite(side.logits)).reshape(len(side.logits), -1).any(1).sum())
        for side in (baseline, compressed)
    )
    if not before and not after:
        return None
    return SafetyItem(
        name="safety/outputs_not_finite",
        baseline=before,
        compressed=after,
        difference=after - before,
        interval=None,
        margin=None,
        verdict="FAIL" if after else "INCONCLUSIVE",
        note=f"outputs of {after} of {len(compressed.logits)} images are not finite",
    )


def identical_item(check: Check, scores: GroupedScores) -> SafetyItem:
    """Nothing to judge: both models said the same, bit by bit."""
    value = scores.value(check.score)
    known = value if np.isfinite(value) else None
    return SafetyItem(
        name=check.name,
        baseline=known,
        compressed=known,
        difference=0.0,
        interval=(0.0, 0.0),
        margin=check.margin,
        verdict="PASS",
        note="the outputs are identical",
    )


def judged_items(
    checks: Sequence[Check],
    paired: Mapping[str, PairedLoss],
    scores: GroupedScores,
    spec: DataSpec,
) -> tuple[SafetyItem, ...]:
    """Judge every check; the sensitivities are one family."""
    questions = [
        Question(
            name=check.name,
            paired=paired[check.score],
            margin=check.margin,
            resolution=resolution_of(check, scores, spec),
        )
        for check in checks
    ]
    overall = [q for q, check in zip(questions, checks, strict=True) if check.position is None]
    classes = questions[len(overall) :]
    return (*(item for one in overall for item in judge_family([one])), *judge_family(classes))


def resolution_of(check: Check, scores: GroupedScores, spec: DataSpec) -> Resolution:
    """How much the groups behind a score can tell."""
    if check.position is None:
        return Resolution(
            num_groups=scores.num_groups, group_kind=f"{spec.group_kind}s", is_proportion=False
        )
    return Resolution(
        num_groups=scores.num_groups_of_class[check.position],
        group_kind=f"{spec.group_kind}s with this class",
        is_proportion=spec.task == "classification",
    )


def rarest_class(spec: DataSpec, scores: GroupedScores) -> RarestClass:
    """By training counts, the background of a segmentation aside."""
    first = 1 if spec.task == "segmentation" else 0
    position = min(range(first, len(spec.class_names)), key=spec.class_counts.__getitem__)
    return RarestClass(
        name=spec.class_names[position],
        train_count=spec.class_counts[position],
        test_count=scores.num_samples_of_class[position],
    )
