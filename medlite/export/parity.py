"""Does what was exported say the same as torch, on the same real images?

Shapes in docstrings: N images, K logits, H W D height width depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from medlite.errors import ExportError
from medlite.metrics.decisions import decisions

if TYPE_CHECKING:
    from medlite.types import Labels


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a runtime may be from torch.

    Float graphs are held to their logits, also where their weights are stored in few bits.
    Graphs of 8-bit integers are held to their decisions: engines round half a step differently,
    so one logit may move by a whole step of the last layer's scale although both are right.
    Half precision is held to both, with room for engines that compute in float32 instead.
    """

    max_relative_difference: float | None
    """of the largest |logit|"""
    max_flip_ratio: float
    """share of the decisions (images, pixels, or labels of images)"""
    min_dice: float
    """between the two masks, for segmentation"""


_TINY = float(np.finfo(np.float32).tiny)

_FLOAT = Tolerance(max_relative_difference=1e-3, max_flip_ratio=1e-3, min_dice=0.999)

TOLERANCES = {
    "fp32": _FLOAT,
    "int8": Tolerance(max_relative_difference=None, max_flip_ratio=0.02, min_dice=0.98),
    "w4": _FLOAT,
    "w3": _FLOAT,
    "w2": _FLOAT,
    "fp16": Tolerance(max_relative_difference=0.02, max_flip_ratio=0.005, min_dice=0.995),
    "bf16": Tolerance(max_relative_difference=0.1, max_flip_ratio=0.02, min_dice=0.98),
}
"""By the precision of the artifact. A float decision may flip where two logits are equal to
within the rounding of float32, hence its ratio is not 0."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The logits and decisions of a runtime beside those of torch."""

    precision: str
    num_images: int
    max_abs_difference: float
    max_relative_difference: float
    """the largest difference over the largest |logit| of torch; infinite where a logit is not
    finite"""
    cosine: float
    """between all logits of torch and all of the runtime; NaN where one is not finite"""
    num_decisions: int
    num_flips: int
    dice: float | None
    """between the foregrounds of the two masks, pooled over the images; None for classification"""
    metric_difference: float | None
    """the task metric on the runtime's logits, less that on torch's"""
    tolerance: Tolerance
    passed: bool
    reasons: tuple[str, ...]
    """which tolerances are broken, by how much"""

    @property
    def flip_ratio(self) -> float:
        """Share of the decisions that differ."""
        return self.num_flips / self.num_decisions


def check_parity(
    torch_logits: np.ndarray,
    runtime_logits: np.ndarray,
    *,
    labels: Labels,
    precision: str,
    metric: Callable[[np.ndarray], float] | None = None,
) -> Parity:
    """Compare what torch and a runtime say about the same images.

    Args:
        torch_logits: (N, K) or (N, K, H, W[, D]), of the very network that was exported (for an
            8-bit artifact the quantised one).
        runtime_logits: the same shape.
        labels: what the logits mean.
        precision: of the artifact, a key of `TOLERANCES`.
        metric: logits to the task metric, where targets are at hand.

    Raises:
        ExportError: the shapes differ.
    """
    if torch_logits.shape != runtime_logits.shape:
        message = (
            f"torch gives logits of shape {torch_logits.shape}, the runtime "
            f"{runtime_logits.shape}: they are not of the same images or network"
        )
        raise ExportError(message)
    ours, theirs = torch_logits.astype(np.float64), runtime_logits.astype(np.float64)
    difference = _largest(ours - theirs)
    decided, decided_there = (
        decisions(torch.from_numpy(logits), labels).numpy() for logits in (ours, theirs)
    )
    is_finite = math.isfinite(difference)
    relative = difference / max(_largest(ours), _TINY) if is_finite else math.inf
    num_flips = int(np.count_nonzero(decided != decided_there))
    dice = _dice(decided, decided_there) if ours.ndim > 2 else None
    tolerance = TOLERANCES[precision]
    reasons = _broken(
        tolerance,
        num_logits=theirs.size,
        num_not_finite=int(np.count_nonzero(~np.isfinite(theirs))),
        max_relative_difference=relative,
        num_decisions=decided.size,
        num_flips=num_flips,
        dice=dice,
    )
    return Parity(
        precision=precision,
        num_images=len(ours),
        max_abs_difference=difference,
        max_relative_difference=relative,
        cosine=_cosine(ours, theirs),
        num_decisions=decided.size,
        num_flips=num_flips,
        dice=dice,
        metric_difference=None if metric is None else metric(runtime_logits) - metric(torch_logits),
        tolerance=tolerance,
        passed=not reasons,
        reasons=reasons,
    )


def _largest(values: np.ndarray) -> float:
    """The largest magnitude; infinite where a value is not a number."""
    largest = float(np.abs(values).max())
    return largest if math.isfinite(largest) else math.inf


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    if not math.isfinite(norms):
        return math.nan
    return float(np.sum(a * b) / norms) if norms > 0 else float(np.array_equal(a, b))


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    """2 |agreeing foreground| / (|foreground of a| + |of b|); 1 where both are empty."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero((a == b) & (a > 0)) / total if total else 1.0


def _broken(
    tolerance: Tolerance,
    *,
    num_logits: int,
    num_not_finite: int,
    max_relative_difference: float,
    num_decisions: int,
    num_flips: int,
    dice: float | None,
) -> tuple[str, ...]:
    limit = tolerance.max_relative_difference
    flip_ratio = num_flips / num_decisions
    checks = (
        (
            num_not_finite > 0,
            f"{num_not_finite} of {num_logits} logits of the runtime are NaN or infinite, which no "
            "decision can rest on",
        ),
        (
            not num_not_finite and limit is not None and not max_relative_difference <= limit,
            f"logits differ by {max_relative_difference:.2g} of the largest, more than {limit}",
        ),
        (
            flip_ratio > tolerance.max_flip_ratio,
            f"{num_flips} of {num_decisions} decisions flip ({flip_ratio:.2%}), more than "
            f"{tolerance.max_flip_ratio:.2%}",
        ),
        (
            dice is not None and dice < tolerance.min_dice,
            f"the masks overlap with Dice {dice or 0:.4f}, less than {tolerance.min_dice}",
        ),
    )
    return tuple(reason for is_broken, reason in checks if is_broken)
