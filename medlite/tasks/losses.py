"""What training minimises: losses of torch and MONAI, chosen by the kind of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from monai.losses import DiceCELoss, DiceFocalLoss, FocalLoss
from torch import Tensor, nn
from torch.nn import functional as F

from medlite.errors import ConfigError, did_you_mean
from medlite.types import DataSpec, inverse_frequencies

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES = {
    "classification": ("cross_entropy", "focal"),
    "segmentation": ("dice_ce", "dice_focal", "cross_entropy", "focal"),
}


def build_loss(spec: DataSpec, *, name: str = "auto", class_weights: str = "none") -> Loss:
    """A function (logits, target) -> scalar for the labels of `spec`.

    Args:
        spec: decides between softmax (multi-class) and sigmoids (binary, multi-label).
        name: "auto" is cross-entropy for classification, and Dice + cross-entropy for
            segmentation (Isensee et al., nnU-Net, Nature Methods 2021, Methods).
            "focal" is Lin et al., ICCV 2017, equation 5, with gamma 2.
        class_weights: "balanced" weights classes by inverse training frequency (mean 1).

    Raises:
        ConfigError: the name is unknown or does not go with the task.
    """
    options = LOSSES[spec.task]
    chosen = options[0] if name == "auto" else name
    if chosen not in options:
        hint = did_you_mean(chosen, options)
        raise ConfigError([f"train.loss: {name!r} is not a loss for {spec.task}, {hint}"])
    weights = _class_weights(spec, class_weights)
    is_softmax = spec.labels == "multiclass"
    if chosen == "cross_entropy":
        return _softmax_loss(weights) if is_softmax else _sigmoid_loss(weights)
    monai_loss = _monai_loss(chosen, spec=spec, weights=weights)
    return partial(_on_channels, monai_loss, is_softmax=is_softmax, num_classes=spec.num_classes)


def balanced_weights(class_counts: Sequence[int]) -> Tensor:
    """Inverse frequencies with mean 1, (K,) float32; classes without a sample count as one.

    >>> balanced_weights([30, 10])
    tensor([0.5000, 1.5000])
    """
    return torch.tensor(inverse_frequencies(class_counts))


def _class_weights(spec: DataSpec, mode: str) -> Tensor | None:
    if mode not in ("none", "balanced"):
        hint = did_you_mean(mode, ("none", "balanced"))
        raise ConfigError([f"train.class_weights: {mode!r} is not known, {hint}"])
    if mode == "none":
        return None
    if spec.labels == "multiclass":
        return balanced_weights(spec.class_counts)
    if spec.labels == "binary":
        background, foreground = spec.class_counts
        return torch.tensor([background / max(foreground, 1)])
    total = spec.num_samples["train"]
    return torch.tensor([(total - count) / max(count, 1) for count in spec.class_counts])


def _softmax_loss(class_weights: Tensor | None) -> Loss:
    """Cross-entropy for targets (B, ...) of logits (B, K, ...), on the device of the logits."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        weights = None if class_weights is None else class_weights.to(logits.device)
        return F.cross_entropy(logits, target, weight=weights)

    return loss


def _sigmoid_loss(positive_weights: Tensor | None) -> Loss:
    """Binary cross-entropy for targets (B, ...) of one logit, or (B, K) of several."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        weights = None
        if positive_weights is not None:
            shape = (-1, *([1] * (logits.ndim - 2)))
            weights = positive_weights.to(logits.device).reshape(shape)
        expected = target.reshape(logits.shape).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, expected, pos_weight=weights)

    return loss


def _monai_loss(name: str, *, spec: DataSpec, weights: Tensor | None) -> nn.Module:
    is_softmax = spec.labels == "multiclass"
    weighting: dict[str, Any] = {"weight": weights}
    if weights is not None and spec.labels == "binary" and name != "dice_ce":
        weighting = {"alpha": float(weights / (1.0 + weights))}
    if name == "focal":
        return FocalLoss(use_softmax=is_softmax, **weighting)
    dice = DiceCELoss if name == "dice_ce" else DiceFocalLoss
    loss = dice(softmax=is_softmax, sigmoid=not is_softmax, batch=True, **weighting)
    return cast("nn.Module", loss)


def _on_channels(
    loss: nn.Module, logits: Tensor, target: Tensor, *, is_softmax: bool, num_classes: int
) -> Tensor:
    """Give MONAI its targets as one channel a class: (B, K[, H, W, D]) float."""
    if is_softmax:
        one_hot = F.one_hot(target.long(), num_classes).movedim(-1, 1)
    else:
        one_hot = target.reshape(logits.shape)
    return cast("Tensor", loss.to(logits.device)(logits, one_hot.to(logits.dtype)))
