"""Decisions that compression changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from medlite.metrics.decisions import decisions
from medlite.safety.statistics import mcnemar_p_value

if TYPE_CHECKING:
    from medlite.types import DataSpec, Predictions


@dataclass(frozen=True, kw_only=True)
class Flips:
    """How many decisions changed, and to what good."""

    unit: str
    """"images" or "pixels" """
    total: int
    changed: int
    broken: int
    """right before, wrong after"""
    mended: int
    """wrong before, right after"""
    mcnemar_p: float | None
    """of broken against mended; None for pixels, and where a patient has several images: neither
    are independent"""


def count_flips(baseline: Predictions, compressed: Predictions, spec: DataSpec) -> Flips:
    """Compare decisions image by image (all labels of a multi-label image as one), or by pixel."""
    before, after = (
        decisions(torch.from_numpy(side.logits), spec.labels) for side in (baseline, compressed)
    )
    target = torch.from_numpy(baseline.targets).long()
    was_right, is_right, is_same = before == target, after == target, before == after
    if spec.labels == "multilabel":
        was_right, is_right, is_same = (part.all(1) for part in (was_right, is_right, is_same))
    broken, mended = int((was_right & ~is_right).sum()), int((~was_right & is_right).sum())
    is_image = spec.task == "classification"
    are_independent = is_image and len(set(baseline.groups)) == len(baseline.groups)
    return Flips(
        unit="images" if is_image else "pixels",
        total=is_same.numel(),
        changed=int((~is_same).sum()),
        broken=broken,
        mended=mended,
        mcnemar_p=mcnemar_p_value(broken, mended) if are_independent else None,
    )
