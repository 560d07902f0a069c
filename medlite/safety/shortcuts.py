"""What a model can still tell when it should not: images whose finding is hidden.

A classifier that reads a marker in the corner, the scanner's frame or the ruler beside a lesion
scores well until it is deployed (Winkler et al. 2019, "Association between surgical skin markings
in dermoscopic images and diagnostic performance of a deep learning convolutional neural network",
JAMA Dermatology 155; DeGrave, Janizek & Lee 2021, "AI for radiographic COVID-19 detection selects
shortcuts over signal", Nature Machine Intelligence 3). So parts of the test images are hidden, and
both models are asked again. Hidden pixels take the values of the nearest visible ones.

Shapes: N samples, C channels, H W D height width depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.ndimage import binary_dilation, distance_transform_edt

from medlite.metrics import counts
from medlite.metrics.decisions import decisions
from medlite.metrics.intervals import bootstrap, percentile_interval
from medlite.metrics.paired_scores import group_of
from medlite.metrics.statistics import group_sums, pooled
from medlite.safety.resolution import MIN_GROUPS
from medlite.safety.robustness import known, task_statistic
from medlite.types import Measurement

if TYPE_CHECKING:
    from medlite.metrics.intervals import Statistic
    from medlite.types import DataSpec, Predictions

BORDER_RATIO = 1 / 8
"""of each side in plane: where markers, rulers and frames are"""

MARGIN_RATIO = 1 / 16
"""of the shorter side: how far a hidden finding is grown, for what its rim gives away"""

CHANCE_AUC = 0.5
MARKED_BY_CHANCE = 0.1
"""a segmentation that marks more than this share of findings that are gone draws on context"""

PROBES = {
    "finding_hidden": "the annotated finding is hidden",
    "border_alone": "everything but the outer eighth is hidden",
    "border_hidden": "the outer eighth is hidden",
}


@dataclass(frozen=True, kw_only=True)
class ShortcutRow:
    """Both models under one probe; None where the score is not defined."""

    probe: str
    baseline: float | None
    """None too where there is no uncompressed model"""
    compressed: float | None
    interval: tuple[float, float] | None
    """95 %, of the compressed model's score"""
    difference: float | None
    """how much more the compressed model can tell"""
    difference_interval: tuple[float, float] | None
    limit: float | None
    """what a model without shortcuts has; None: a high score is no fault here"""
    is_suspect: bool
    """the whole interval lies above the limit, and enough patients say so"""


@dataclass(frozen=True, kw_only=True)
class ShortcutReport:
    """What both models tell from images that lack what they should look at."""

    score: str
    """"auc", or "marked": the share of the hidden foreground that is still marked"""
    num_images: int
    num_groups: int
    group_kind: str
    clean_baseline: float | None
    clean_compressed: float | None
    """of whole images"""
    rows: tuple[ShortcutRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what each probe hides in words."""
        plain = asdict(self)
        rows = [{**row, "what": PROBES[row["probe"]]} for row in plain["rows"]]
        return plain | {"rows": rows}


def probes_of(spec: DataSpec, *, has_regions: bool) -> tuple[str, ...]:
    """The probes that say something of a dataset.

    Args:
        spec: the dataset.
        has_regions: whether it is known where the finding of a classified image is.
    """
    if spec.task == "segmentation":
        return ("finding_hidden",)
    return ("finding_hidden",) * has_regions + ("border_alone", "border_hidden")


def hide(image: np.ndarray, probe: str, region: np.ndarray | None) -> np.ndarray:
    """An image (C, H, W[, D]) without what a probe hides; `region` (H, W[, D]) is the finding."""
    if probe == "finding_hidden":
        assert region is not None
        grown = max(1, round(MARGIN_RATIO * min(image.shape[1:3])))
        square = np.ones((3,) * region.ndim, dtype=bool)
        return fill_in(image, binary_dilation(region, square, iterations=grown))
    is_border = border_of(image.shape[1:])
    return fill_in(image, is_border if probe == "border_hidden" else ~is_border)


def border_of(shape: tuple[int, ...]) -> np.ndarray:
    """The outer eighth of each side in plane, bool (H, W[, D]); all slices of a volume alike."""
    inside = np.zeros(shape, dtype=bool)
    rows, columns = (max(1, round(BORDER_RATIO * side)) for side in shape[:2])
    inside[rows:-rows, columns:-columns] = True
    return ~inside


def fill_in(image: np.ndarray, is_hidden: np.ndarray) -> np.ndarray:
    """Hidden pixels (H, W[, D]) take the values of the nearest visible ones; all hidden: the mean.

    Within a plane, so that slices of a volume do not mix.
    """
    if is_hidden.ndim == 3:
        planes = [fill_in(image[..., d], is_hidden[..., d]) for d in range(image.shape[-1])]
        return np.stack(planes, axis=-1)
    if not is_hidden.any():
        return image
    if is_hidden.all():
        return np.broadcast_to(image.mean((1, 2), keepdims=True), image.shape).astype(image.dtype)
    rows, columns = distance_transform_edt(is_hidden, return_distances=False, return_indices=True)
    return image[:, rows, columns]


def shortcut_statistic(predictions: Predictions, spec: DataSpec) -> Statistic:
    """AUC of a classifier; of a segmentation the share of true foreground that is marked."""
    if spec.task == "classification" or not np.isfinite(predictions.logits).all():
        return task_statistic(predictions, spec)
    decided = decisions(torch.from_numpy(predictions.logits), spec.labels) > 0
    found = counts.class_counts(
        decided.long(),
        torch.from_numpy(predictions.targets > 0).long(),
        labels="binary",
        num_classes=2,
    )
    group, num_groups = group_of(predictions), len(set(predictions.groups))
    return pooled(group_sums(found[:, 1], group, num_groups), counts.sensitivity)


def compare_shortcuts(
    baseline: Mapping[str, Statistic] | None,
    compressed: Mapping[str, Statistic],
    *,
    groups: Sequence[str],
    spec: DataSpec,
    num_resamples: int = 2000,
    seed: int = 0,
) -> ShortcutReport:
    """What each model still tells under each probe, with patients resampled, paired.

    Args:
        baseline: probe ("clean" for whole images) -> score of the uncompressed model, if any.
        compressed: of the deployed model, on the same images.
        groups: the patient of each image.
        spec: the dataset.
        num_resamples: of patients.
        seed: of the bootstrap.
    """
    num_groups = len(set(groups))
    sides = {"compressed": compressed} | ({} if baseline is None else {"baseline": baseline})
    statistics = {f"{side}:{p}": each for side, of in sides.items() for p, each in of.items()}
    samples = bootstrap(statistics, num_groups=num_groups, num_resamples=num_resamples, seed=seed)
    once = torch.ones(1, num_groups, dtype=torch.float64)
    values = {
        key: np.concatenate((statistic(once).numpy(), samples[key]))
        for key, statistic in statistics.items()
    }
    before, after = (
        {key.partition(":")[2]: each for key, each in values.items() if key.startswith(side)}
        for side in ("baseline", "compressed")
    )
    return ShortcutReport(
        score="auc" if spec.task == "classification" else "marked",
        num_images=len(groups),
        num_groups=num_groups,
        group_kind=spec.group_kind,
        clean_baseline=known(before["clean"][0]) if before else None,
        clean_compressed=known(after["clean"][0]),
        rows=tuple(
            _row(probe, before.get(probe), each, spec, num_groups)
            for probe, each in after.items()
            if probe != "clean"
        ),
    )


def shortcut_measurements(runtime: str, report: Mapping[str, Any]) -> Iterator[Measurement]:
    """`shortcut/<runtime>/<probe>_<score>` of a `ShortcutReport.to_json`."""
    for row in report["rows"]:
        name = f"shortcut/{runtime}/{row['probe']}_{report['score']}"
        if row["compressed"] is None:
            yield Measurement.unavailable(name, "", "not defined on these images")
            continue
        interval = row["interval"]
        yield Measurement(
            name=name,
            value=row["compressed"],
            unit="",
            n=report["num_images"],
            spread=None if interval is None else (interval[0], interval[1]),
            higher_is_better=None if row["limit"] is None else False,
        )


def _row(
    probe: str, before: np.ndarray | None, after: np.ndarray, spec: DataSpec, num_groups: int
) -> ShortcutRow:
    interval = percentile_interval(after[1:])
    limit = MARKED_BY_CHANCE if spec.task == "segmentation" else CHANCE_AUC
    is_fault = probe != "border_hidden"
    is_above = interval is not None and interval[0] > limit
    extra = None if before is None else after - before
    return ShortcutRow(
        probe=probe,
        baseline=None if before is None else known(before[0]),
        compressed=known(after[0]),
        interval=interval,
        difference=None if extra is None else known(extra[0]),
        difference_interval=None if extra is None else percentile_interval(extra[1:]),
        limit=limit if is_fault else None,
        is_suspect=is_fault and is_above and num_groups >= MIN_GROUPS,
    )
