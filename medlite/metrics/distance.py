"""How far the outlines of a segmentation are from the true ones."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def hausdorff95(
    decided: np.ndarray, target: np.ndarray, *, num_classes: int, spacing_mm: Sequence[float] | None
) -> np.ndarray:
    """The 95th percentile of the distance between outlines, at least 0, lower is better.

    MONAI's symmetric percentile Hausdorff distance (Huttenlocher et al. 1993, "Comparing images
    using the Hausdorff distance"). There is no distance where a class is missing from either side.

    Args:
        decided: (N, H, W[, D]) class of each pixel.
        target: as `decided`.
        num_classes: foreground classes are 1 to num_classes - 1.
        spacing_mm: size of a pixel along each axis; None: distances are in pixels.

    Returns:
        (N, num_classes - 1), NaN where a class is missing from `decided` or `target`.
    """
    from monai.metrics import compute_hausdorff_distance

    distances = np.full((len(decided), num_classes - 1), np.nan)
    for image, label in np.ndindex(*distances.shape):
        found = torch.from_numpy(decided[image] == label + 1)
        true = torch.from_numpy(target[image] == label + 1)
        if not (found.any() and true.any()):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI's own use of an old argument
            distance = compute_hausdorff_distance(
                found[None, None],
                true[None, None],
                include_background=True,
                percentile=95,
                spacing=None if spacing_mm is None else list(spacing_mm),
            )
        distances[image, label] = float(distance)
    return distances


SURFACE_TOLERANCE = 2.0
"""mm, or pixels where no spacing is known: outlines that are no further apart count as one"""


def surface_name(spacing_mm: Sequence[float] | None) -> str:
    """What `normalised_surface_dice` is called: "nsd_2mm" or "nsd_2px"."""
    return f"nsd_{SURFACE_TOLERANCE:g}{'px' if spacing_mm is None else 'mm'}"


def normalised_surface_dice(
    decided: np.ndarray, target: np.ndarray, *, num_classes: int, spacing_mm: Sequence[float] | None
) -> np.ndarray:
    """The share of both outlines that lies within SURFACE_TOLERANCE of the other one.

    MONAI's surface Dice (Nikolov et al., "Deep learning to achieve clinically applicable
    segmentation of head and neck anatomy for radiotherapy", arXiv:1809.04430, section "Surface
    Dice"), in [0, 1], higher is better. A class that is missed scores 0.

    Args:
        decided: (N, H, W[, D]) class of each pixel.
        target: as `decided`.
        num_classes: foreground classes are 1 to num_classes - 1.
        spacing_mm: size of a pixel along each axis; None: the tolerance is in pixels.

    Returns:
        (N, num_classes - 1), NaN where `target` lacks the class.
    """
    from monai.metrics import compute_surface_dice

    scores = np.full((len(decided), num_classes - 1), np.nan)
    for image, label in np.ndindex(*scores.shape):
        found = torch.from_numpy(decided[image] == label + 1)
        true = torch.from_numpy(target[image] == label + 1)
        if not true.any():
            continue
        scores[image, label] = 0
        if found.any():
            score = compute_surface_dice(
                found[None, None],
                true[None, None],
                class_thresholds=[SURFACE_TOLERANCE],
                include_background=True,
                spacing=None if spacing_mm is None else list(spacing_mm),
            )
            scores[image, label] = float(score)
    return scores
