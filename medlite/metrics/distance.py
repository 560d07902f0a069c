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
