"""The safety gate: is the compressed model good enough beside its uncompressed self?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medlite.metrics.paired_scores import paired_scores
from medlite.metrics.statistics import GroupedScores, grouped_scores
from medlite.metrics.task import primary_metric
from medlite.safety.flips import Flips, count_flips
from medlite.safety.judge import Question, SafetyItem, Verdict, judge_family, worst
from medlite.safety.operating_point import OperatingPoint, point_statistics, thresholds_of
from medlite.safety.plan import PROPORTIONS, Check, check_margins, plan
from medlite.safety.rare_classes import RareClass, by_prevalence
from medlite.safety.resolution import Resolution, groups_behind_area, groups_behind_metric
from medlite.safety.shown import (
    ClassIntervals,
    ShownLoss,
    area_p_values,
    class_intervals,
    distance_losses,
    identical_loss,
    shown_losses,
)
from medlite.safety.statistics import PairedLoss, paired_bootstrap

if TYPE_CHECKING:
    from medlite.metrics.intervals import Statistic
    from medlite.safety_settings import SafetyMargins
    from medlite.types import DataSpec, Predictions


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
    rarest_class: RareClass | None = None
    rare_classes: tuple[RareClass, ...] = ()
    """those below `safety.rare_prevalence`, the rarest first"""
    operating_points: tuple[OperatingPoint, ...] = ()
    """where both models were compared besides their own decisions"""
    shown: tuple[ShownLoss, ...] = ()
    """what has no margin"""
    class_intervals: tuple[ClassIntervals, ...] = ()
    """of each class's sensitivity; empty in segmentation"""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_models(
    baseline: Predictions,
    compressed: Predictions,
    spec: DataSpec,
    margins: SafetyMargins,
    *,
    operating_points: tuple[OperatingPoint, ...] = (),
    seed: int = 0,
) -> SafetyReport:
    """Judge the losses of the task metric, calibration and each class's sensitivity.

    Judged: `safety/metric_drop`, `safety/ece_increase`, `safety/nll_increase` and
    `safety/sensitivity_drop/<class>` (every class in classification; the foreground classes, over
    the pixels of resampled groups, in segmentation), `safety/sensitivity_at_point_drop/<class>` of
    the classes that have an operating point, and those of `plan.OPTIONAL` that have a
    margin. Everything else of `plan.plan` is shown beside them, with its interval. Outputs that
    are equal bit by bit pass; otherwise an interval of no width is widened as `judge.Resolution`
    says, so that a class with few test patients is INCONCLUSIVE even if none of them was lost.

    Args:
        baseline: of the uncompressed model.
        compressed: of the compressed model, on the same samples in the same order.
        spec: the dataset; without `class_counts` the rarest class is that of the test split.
        margins: how much worse it may be.
        operating_points: of the uncompressed model, see `choose_operating_points`.
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
    before, after = (grouped_scores(side, spec) for side in (baseline, compressed))
    thresholds = thresholds_of(operating_points, spec)
    checks = plan(spec, margins, thresholds)
    judged = [check for check in checks if check.margin is not None]
    unjudged = [check for check in checks if check.margin is None]
    first, second = (
        paired_scores(side, spec, scores) | point_statistics(side, spec, thresholds)
        for side, scores in ((baseline, before), (compressed, after))
    )
    if np.array_equal(baseline.logits, compressed.logits):
        items, shown = identical_items(judged, unjudged, first, before.num_groups)
    else:
        paired = paired_bootstrap(
            first,
            second,
            higher_is_better={check.score: check.higher_is_better for check in checks},
            num_groups=before.num_groups,
            num_resamples=margins.num_resamples,
            seed=seed,
        )
        p_values = area_p_values(baseline, compressed, spec)
        items = judged_items(judged, paired, before, spec)
        items = tuple(replace(item, p_value=p_values.get(item.name)) for item in items)
        shown = shown_losses(unjudged, paired, p_values)
    if spec.task == "segmentation":
        shown += distance_losses(baseline, compressed, spec, margins, seed)
    classes = by_prevalence(spec, before, len(baseline.targets))
    return replace(
        build_report(items, baseline, spec, margins, seed),
        flips=count_flips(baseline, compressed, spec),
        rarest_class=classes[0],
        rare_classes=tuple(c for c in classes if c.prevalence < margins.rare_prevalence),
        operating_points=operating_points,
        shown=shown,
        class_intervals=class_intervals(before, after, spec),
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
        note=f"outputs are not finite: of the compressed model for {after}, of the uncompressed "
        f"one for {before} of {len(compressed.logits)} images",
    )


def identical_items(
    judged: Sequence[Check],
    unjudged: Sequence[Check],
    statistics: Mapping[str, Statistic],
    num_groups: int,
) -> tuple[tuple[SafetyItem, ...], tuple[ShownLoss, ...]]:
    """Nothing to judge: both models said the same, bit by bit."""
    everyone = torch.ones(1, num_groups, dtype=torch.float64)
    values = {check.score: float(statistics[check.score](everyone)) for check in judged}
    known = {score: value if np.isfinite(value) else None for score, value in values.items()}
    items = tuple(
        SafetyItem(
            name=check.name,
            baseline=known[check.score],
            compressed=known[check.score],
            difference=0.0,
            interval=(0.0, 0.0),
            margin=check.margin,
            verdict="PASS",
            note="the outputs are identical",
        )
        for check in judged
    )
    shown = [identical_loss(each, float(statistics[each.score](everyone))) for each in unjudged]
    return items, tuple(shown)


def judged_items(
    checks: Sequence[Check],
    paired: Mapping[str, PairedLoss],
    scores: GroupedScores,
    spec: DataSpec,
) -> tuple[SafetyItem, ...]:
    """Judge every check, those of one kind together."""
    families: dict[str, list[Question]] = {}
    for check in checks:
        assert check.margin is not None
        question = Question(
            name=check.name,
            paired=paired[check.score],
            margin=check.margin,
            resolution=resolution_of(check, scores, spec),
        )
        families.setdefault(check.family, []).append(question)
    return tuple(item for family in families.values() for item in judge_family(family))


def resolution_of(check: Check, scores: GroupedScores, spec: DataSpec) -> Resolution:
    """How much the groups behind a score can tell."""
    kind = f"{spec.group_kind}s"
    if check.score == primary_metric(spec):
        behind = groups_behind_metric(scores.counts, task=spec.task)
        if behind < scores.num_groups:
            kind += " behind the rarest class"
        return Resolution(num_groups=behind, group_kind=kind, is_proportion=False)
    if check.position is None:
        return Resolution(num_groups=scores.num_groups, group_kind=kind, is_proportion=False)
    if check.family == "auc_drop":
        behind = groups_behind_area(scores.counts, check.position)
        kind += " on the smaller side of the curve"
        return Resolution(num_groups=behind, group_kind=kind, is_proportion=False)
    is_about_others = check.score.startswith("specificity")
    num_groups = scores.num_groups_of_class[check.position]
    if is_about_others:
        others = scores.counts[:, check.position, 1] + scores.counts[:, check.position, 3]
        num_groups = int((others > 0).sum())
    return Resolution(
        num_groups=num_groups,
        group_kind=f"{kind} {'without' if is_about_others else 'with'} this class",
        is_proportion=spec.task == "classification" and check.family in PROPORTIONS,
    )
