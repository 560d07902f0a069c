"""From logits to probabilities and decisions, the same way everywhere.

Shapes: B batch, K logits, (...) nothing for classification, H, W[, D] for segmentation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from medlite.types import Labels


def probabilities(logits: Tensor, labels: Labels) -> Tensor:
    """Sigmoid of binary and multi-label logits, softmax over the classes of multi-class ones.

    Args:
        logits: (B, K, ...).
        labels: what the logits mean; "binary" has K = 1.

    Returns:
        (B, K, ...), in [0, 1].
    """
    return logits.softmax(dim=1) if labels == "multiclass" else logits.sigmoid()


def decisions(logits: Tensor, labels: Labels) -> Tensor:
    """The class of each sample or pixel: the likeliest, or those with probability over 0.5.

    Args:
        logits: (B, K, ...).
        labels: what the logits mean; "binary" has K = 1.

    Returns:
        int64; (B, ...) for "binary" and "multiclass", (B, K) for "multilabel".
    """
    if labels == "multiclass":
        return logits.argmax(dim=1)
    is_present = (logits > 0).long()
    return is_present[:, 0] if labels == "binary" else is_present
