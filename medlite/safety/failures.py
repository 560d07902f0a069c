"""Where the deployed model fails, and where compression made it worse: cases, and what they share.

The loss of an image is its negative log likelihood, or of a mask 1 - Dice averaged over the
foreground classes that the image has; a mask without foreground has none and is left out.

Shapes: N samples, C classes, G groups (patients).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medlite.metrics import counts
from medlite.metrics.intervals import bootstrap, percentile_interval
from medlite.metrics.statistics import mean_of, sample_sums
from medlite.safety.exemplars import class_presence

if TYPE_CHECKING:
    from medlite.types import DataSpec, Predictions

NUM_CASES = 12
WORST_SHARE = 0.1
"""of all images, by the loss of the deployed model: the failures that groups are counted in"""

SIZES = ("small", "medium", "large")
LEVELS = ("low", "middle", "high")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image; `position` is its place in the test split."""

    position: int
    before: float | None
    """loss of the uncompressed model; None where there is none"""
    after: float


@dataclass(frozen=True, kw_only=True)
class FailureGroup:
    """Images that share something, and how they fare."""

    kind: str
    """"class", "foreground", "source", or one of `image_quality.QUALITIES`"""
    name: str
    num_images: int
    num_worst: int
    """of them among the WORST_SHARE of all images"""
    before: float | None
    after: float
    """mean loss"""
    change: float | None
    interval: tuple[float, float] | None
    """95 % paired bootstrap interval of the change, over patients"""


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """The worst cases by loss and by change, and every group."""

    loss: str
    num_images: int
    """with a loss"""
    num_worst: int
    worst: tuple[Case, ...]
    changed: tuple[Case, ...]
    """those that compression made worse, the most first"""
    groups: tuple[FailureGroup, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def find_failures(
    baseline: Predictions | None,
    compressed: Predictions,
    spec: DataSpec,
    *,
    qualities: Mapping[str, np.ndarray] | None = None,
    sources: Sequence[str | None] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> FailureReport | None:
    """Look at every image's loss; None where an output is not finite or no image has a loss.

    Args:
        baseline: of the uncompressed model, if there is one.
        compressed: of the deployed model, on the same images in the same order.
        spec: the dataset.
        qualities: of `measure_quality`, for groups of images by thirds of each.
        sources: the site, scanner or study of each image, where it is known.
        num_resamples: of patients, for the intervals.
        seed: of the bootstrap.
    """
    sides = [side for side in (baseline, compressed) if side is not None]
    if not all(np.isfinite(side.logits).all() for side in sides):
        return None
    losses = [image_losses(side, spec) for side in sides]
    before, after = (losses[0] if baseline is not None else None), losses[-1]
    known = np.flatnonzero(np.isfinite(after))
    if not len(known):
        return None
    members = class_groups(compressed.targets, spec) | size_groups(compressed.targets, spec)
    members |= source_groups(sources or ()) | quality_groups(qualities or {})
    shown = {key: is_in & np.isfinite(after) for key, is_in in members.items()}
    num_worst = max(1, round(WORST_SHARE * len(known)))
    by_loss = known[np.argsort(-after[known], kind="stable")]
    changed: list[int] = []
    intervals: dict[tuple[str, str], tuple[float, float] | None] = {}
    if before is not None:
        by_change = known[np.argsort(-(after - before)[known], kind="stable")]
        changed = [int(p) for p in by_change[:NUM_CASES] if after[p] > before[p]]
        intervals = _intervals(
            shown, after - before, compressed.groups, num_resamples=num_resamples, seed=seed
        )
    is_worst = np.zeros(len(after), dtype=bool)
    is_worst[by_loss[:num_worst]] = True
    return FailureReport(
        loss="1 - Dice" if spec.task == "segmentation" else "negative log likelihood",
        num_images=len(known),
        num_worst=num_worst,
        worst=tuple(_case(int(p), before, after) for p in by_loss[:NUM_CASES]),
        changed=tuple(_case(p, before, after) for p in changed),
        groups=tuple(
            _group(key, is_in, before, after, is_worst=is_worst, interval=intervals.get(key))
            for key, is_in in shown.items()
            if is_in.any()
        ),
    )


def image_losses(predictions: Predictions, spec: DataSpec) -> np.ndarray:
    """The loss of each image, float64 (N,); NaN where it has none."""
    sums = sample_sums(predictions, spec)
    if spec.task == "segmentation":
        return 1 - counts.mean_foreground_dice(sums["counts"]).double().numpy()
    return sums["nll"].double().numpy()


def class_groups(targets: np.ndarray, spec: DataSpec) -> dict[tuple[str, str], np.ndarray]:
    """("class", name) -> which images have it, bool (N,); the background of a mask aside."""
    presence = class_presence(targets, spec)
    first = 1 if spec.task == "segmentation" else 0
    names = list(enumerate(spec.class_names))[first:]
    return {("class", name): presence[:, position] for position, name in names}


def size_groups(targets: np.ndarray, spec: DataSpec) -> dict[tuple[str, str], np.ndarray]:
    """("foreground", size and limits) -> which images, in thirds of those with foreground."""
    if spec.task != "segmentation":
        return {}
    share = (targets > 0).reshape(len(targets), -1).mean(axis=1)
    if not (share > 0).any():
        return {}
    low, high = np.quantile(share[share > 0], (1 / 3, 2 / 3), method="lower")
    limits = (f"up to {low:.2%}", f"{low:.2%} to {high:.2%}", f"over {high:.2%}")
    members = ((share > 0) & (share <= low), (share > low) & (share <= high), share > high)
    names = [f"{size}: {words} of the image" for size, words in zip(SIZES, limits, strict=True)]
    return {("foreground", name): m for name, m in zip(names, members, strict=True)}


def source_groups(sources: Sequence[str | None]) -> dict[tuple[str, str], np.ndarray]:
    """("source", name) -> which images, of those whose source is known."""
    known = sorted({source for source in sources if source is not None})
    return {("source", name): np.array([s == name for s in sources]) for name in known}


def quality_groups(
    qualities: Mapping[str, np.ndarray],
) -> dict[tuple[str, str], np.ndarray]:
    """(quality, level and limits) -> which images, in thirds; none of a quality that all share."""
    groups = {}
    for quality, values in qualities.items():
        low, high = np.quantile(values, (1 / 3, 2 / 3), method="lower")
        members = (values <= low, (values > low) & (values <= high), values > high)
        limits = (f"up to {low:.3g}", f"{low:.3g} to {high:.3g}", f"over {high:.3g}")
        if not all(each.any() for each in members):
            continue
        for level, words, is_in in zip(LEVELS, limits, members, strict=True):
            groups[quality, f"{level}: {words}"] = is_in
    return groups


def _intervals(
    members: Mapping[tuple[str, str], np.ndarray],
    change: np.ndarray,
    groups: tuple[str, ...],
    *,
    num_resamples: int,
    seed: int,
) -> dict[tuple[str, str], tuple[float, float] | None]:
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    group = torch.from_numpy(index.astype(np.int64))
    statistics = {
        f"{kind}:{name}": mean_of(
            torch.from_numpy(np.where(is_in, change, np.nan)), group, len(names)
        )
        for (kind, name), is_in in members.items()
    }
    samples = bootstrap(statistics, num_groups=len(names), num_resamples=num_resamples, seed=seed)
    return {
        key: percentile_interval(samples[f"{key[0]}:{key[1]}"])
        for key, is_in in members.items()
        if len(set(index[is_in])) > 1  # one patient, resampled, varies in nothing
    }


def _group(
    key: tuple[str, str],
    is_in: np.ndarray,
    before: np.ndarray | None,
    after: np.ndarray,
    *,
    is_worst: np.ndarray,
    interval: tuple[float, float] | None,
) -> FailureGroup:
    mean_before = None if before is None else float(before[is_in].mean())
    mean_after = float(after[is_in].mean())
    return FailureGroup(
        kind=key[0],
        name=key[1],
        num_images=int(is_in.sum()),
        num_worst=int((is_in & is_worst).sum()),
        before=mean_before,
        after=mean_after,
        change=None if mean_before is None else mean_after - mean_before,
        interval=interval,
    )


def _case(position: int, before: np.ndarray | None, after: np.ndarray) -> Case:
    return Case(
        position=position,
        before=None if before is None else float(before[position]),
        after=float(after[position]),
    )
