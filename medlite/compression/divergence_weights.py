"""Which pixels and images weigh more in the divergence from a teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medlite.types import DataSpec, Labels, inverse_frequencies


def near_boundary(classes: Tensor, *, width_px: int) -> Tensor:
    """Whether another class lies within `width_px` rows and columns of a pixel.

    That is a band of 2 `width_px` pixels, half on each side of every boundary.

    Args:
        classes: (B, H, W[, D]), class of each pixel.
        width_px: pixels of the band on each side.

    Returns:
        (B, H, W[, D]) bool.

    >>> near_boundary(torch.tensor([[[0, 0, 0, 1, 1, 1]]]), width_px=1).int().tolist()
    [[[0, 0, 1, 1, 0, 0]]]
    """
    pool = F.max_pool2d if classes.ndim == 3 else F.max_pool3d
    values = classes.float().unsqueeze(1)
    window = 2 * width_px + 1
    highest = pool(values, window, stride=1, padding=width_px)
    lowest = -pool(-values, window, stride=1, padding=width_px)
    return (highest != lowest).squeeze(1)


def decided_classes(logits: Tensor, labels: Labels) -> Tensor:
    """(B, K, H, W[, D]) -> (B, H, W[, D]): the class that a segmentation decides for."""
    return logits.argmax(1) if labels == "multiclass" else (logits[:, 0] > 0).long()


def balanced_weights(target: Tensor, spec: DataSpec) -> Tensor:
    """The weight of each label's class: inverse training frequency, mean 1 over the classes.

    A multi-label logit has two classes of its own, present and absent.

    Args:
        target: (B[, H, W, D]) class indices, or (B, K) zeros and ones of multi-label tasks.
        spec: for the counts of training images or pixels.

    Returns:
        (B, 1[, H, W, D]), or (B, K) for multi-label tasks.
    """
    if spec.labels != "multilabel":
        return (
            torch.tensor(inverse_frequencies(spec.class_counts))
            .to(target.device)[target.long()]
            .unsqueeze(1)
        )
    total = spec.num_samples["train"]
    pairs = [inverse_frequencies((total - count, count)) for count in spec.class_counts]
    absent, present = torch.tensor(pairs).to(target.device).unbind(1)
    return torch.where(target > 0, present, absent)
