"""Losses that nobody set a margin for, and intervals of proportions: shown, not judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from medlite.metrics.decisions import probabilities
from medlite.metrics.intervals import clopper_pearson_interval, wilson_interval
from medlite.metrics.names import class_keys
from medlite.metrics.paired_scores import surface_distances
from medlite.metrics.ranking import one_vs_rest
from medlite.safety.delong import delong
from medlite.safety.statistics import PairedLoss, holm, paired_bootstrap

if TYPE_CHECKING:
    from medlite.metrics.statistics import GroupedScores
    from medlite.safety.plan import Check
    from medlite.safety_settings import SafetyMargins
    from medlite.types import DataSpec, Predictions


@dataclass(frozen=True, kw_only=True)
class ShownLoss:
    """One score of both models without a margin."""

    name: str
    baseline: float | None
    compressed: float | None
    difference: float | None
    """how much worse the compressed model is; negative where it is better"""
    interval: tuple[float, float] | None
    """95 %, of the difference"""
    p_value: float | None = None
    """of equal areas under the ROC curve (DeLong), corrected over the classes (Holm)"""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ClassIntervals:
    """How well so few patients tell the sensitivity of a class, before and after."""

    name: str
    num_groups: int
    """groups that have the class; each counts once, as in the evaluation"""
    baseline: float
    baseline_wilson: tuple[float, float]
    baseline_exact: tuple[float, float]
    """Clopper-Pearson"""
    compressed: float
    compressed_wilson: tuple[float, float]
    compressed_exact: tuple[float, float]


def shown_losses(
    checks: Sequence[Check], paired: Mapping[str, PairedLoss], p_values: Mapping[str, float | None]
) -> tuple[ShownLoss, ...]:
    """The checks without a margin, as they came out."""
    return tuple(
        shown_loss(check.name, paired[check.score], p_value=p_values.get(check.name))
        for check in checks
    )


def shown_loss(
    name: str, paired: PairedLoss, *, p_value: float | None = None, note: str = ""
) -> ShownLoss:
    """One of them; nothing where the split is too poor to have the score."""
    if not math.isfinite(paired.loss):
        return ShownLoss(
            name=name, baseline=None, compressed=None, difference=None, interval=None,
            note=note or "not defined on this split",
        )  # fmt: skip
    return ShownLoss(
        name=name,
        baseline=paired.first,
        compressed=paired.second,
        difference=paired.loss,
        interval=paired.interval,
        p_value=p_value,
        note=note,
    )


def identical_loss(check: Check, value: float) -> ShownLoss:
    """Both models said the same, bit by bit; `value` is the score of either."""
    known = value if math.isfinite(value) else None
    return ShownLoss(
        name=check.name, baseline=known, compressed=known, difference=0.0, interval=(0.0, 0.0),
        note="the outputs are identical",
    )  # fmt: skip


def area_p_values(
    baseline: Predictions, compressed: Predictions, spec: DataSpec
) -> dict[str, float | None]:
    """DeLong's p value of `safety/auc_drop/<class>`, corrected over the classes that have one.

    Empty for segmentation and where a patient has several images, which the test takes for
    independent.
    """
    if spec.task == "segmentation" or len(set(baseline.groups)) < len(baseline.groups):
        return {}
    before, after = (
        probabilities(torch.from_numpy(side.logits).double(), spec.labels).numpy()
        for side in (baseline, compressed)
    )
    is_positive = one_vs_rest(
        torch.from_numpy(baseline.targets), labels=spec.labels, num_logits=before.shape[1]
    ).numpy()
    keys = class_keys(spec.class_names)[-before.shape[1] :]
    columns = zip(keys, before.T, after.T, is_positive.T, strict=True)
    tests = {f"safety/auc_drop/{key}": delong(*column) for key, *column in columns}
    known = {k: v.p_value for k, v in tests.items() if v is not None and v.p_value is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))


def distance_losses(
    baseline: Predictions,
    compressed: Predictions,
    spec: DataSpec,
    margins: SafetyMargins,
    seed: int,
) -> tuple[ShownLoss, ...]:
    """How much further the outlines of each foreground class are from the true ones."""
    before, after, num_shared = surface_distances(baseline, compressed, spec)
    paired = paired_bootstrap(
        before,
        after,
        higher_is_better=dict.fromkeys(before, False),
        num_groups=len(set(baseline.groups)),
        num_resamples=margins.num_resamples,
        seed=seed,
    )
    losses = []
    for score, loss in paired.items():
        family, _, key = score.partition("/")
        outlines = f"{num_shared[score]} of {len(baseline.logits)} images: outlines on both sides"
        losses.append(shown_loss(f"safety/{family}_increase/{key}", loss, note=outlines))
    return tuple(losses)


def class_intervals(
    before: GroupedScores, after: GroupedScores, spec: DataSpec
) -> tuple[ClassIntervals, ...]:
    """Of the classes that occur; none in segmentation, whose pixels are no trials."""
    if spec.task == "segmentation":
        return ()
    rows = []
    for position, key in enumerate(class_keys(spec.class_names)):
        num_groups = before.num_groups_of_class[position]
        if not num_groups:
            continue
        first, second = (side.value(f"sensitivity/{key}") for side in (before, after))
        hits = [min(share * num_groups, num_groups) for share in (first, second)]
        rows.append(
            ClassIntervals(
                name=spec.class_names[position],
                num_groups=num_groups,
                baseline=first,
                baseline_wilson=wilson_interval(hits[0], num_groups),
                baseline_exact=clopper_pearson_interval(hits[0], num_groups),
                compressed=second,
                compressed_wilson=wilson_interval(hits[1], num_groups),
                compressed_exact=clopper_pearson_interval(hits[1], num_groups),
            )
        )
    return tuple(rows)
