"""Distillation: the net learns from a larger, trained one, and keeps its own structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.compression.checks import check_options, training_rules
from medlite.compression.copies import evaluation_copy
from medlite.compression.feature_matching import FeatureMatching, deepest_features, tapped
from medlite.compression.order import Stage
from medlite.errors import MedliteError
from medlite.types import Batch, CompressionContext, DataSpec, FitHooks, Labels


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.

    loss = (1 - alpha) task_loss + alpha T^2 KL(teacher || student) + feature_weight distance,
    with softened probabilities of logits / T. For segmentation the divergence is the mean over
    pixels; for binary and multi-label tasks each logit is a distribution of its own. A teacher
    passes on its mistakes too: what it misses of a rare class the student may unlearn.

    With `kind="hard"` the teacher's decision is a second label, and the divergence the cross
    entropy with it (Touvron et al., "Training data-efficient image transformers", arXiv
    2012.12877, equation 3). A student with a distillation token (DeiT, and others that name
    their `distillation_heads`) hears its teacher through the token's head alone and the labels
    through the other one; in evaluation it answers with the mean of both.

    Args:
        epochs: epochs of distillation; the student starts from its trained weights.
        learning_rate: peak learning rate.
        kind: soft or hard.
        teacher: a model option, trained by the run's own settings and kept in the store; "auto"
            takes unet for segmentation, resnet18 for classification.
        temperature: T, at least 1 softens; of the soft kind.
        alpha: share of the teacher in the loss of the logits, in [0, 1].
        feature_weight: weight of the distance between feature maps; 0: logits only.
        features: student module -> teacher module, by path, for that distance; by default the
            deepest map of each (see `deepest_features`).
    """

    stage: ClassVar[Stage] = "train"

    epochs: int
    learning_rate: float
    kind: str = "soft"
    teacher: str = "auto"
    temperature: float = 2.0
    alpha: float = 0.5
    feature_weight: float = 0.0
    features: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(
            [
                *training_rules(self.epochs, self.learning_rate),
                ("kind", self.kind, self.kind in ("soft", "hard"), "soft or hard"),
                ("temperature", self.temperature, self.temperature > 0, "above 0"),
                ("alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]"),
                ("feature_weight", self.feature_weight, self.feature_weight >= 0, "0 or above"),
            ]
        )

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the distilled net, without the teacher and the adapters; `net` stays as it is."""
        student = evaluation_copy(net)
        teacher = context.build_teacher().eval().requires_grad_(False)
        images = torch.zeros(2, *context.spec.input_shape)
        pairs = self._pairs(student, teacher, images)
        context.report("distillation", self._describe(teacher, pairs))
        heads = getattr(student, "distillation_heads", None)
        with ExitStack() as stack:
            said = stack.enter_context(tapped(student, list(heads or ()), "distillation_heads"))
            student_maps = stack.enter_context(tapped(student, list(pairs), "distill.features"))
            teacher_maps = stack.enter_context(
                tapped(teacher, list(pairs.values()), "distill.features")
            )
            _check_outputs(student, teacher, images)
            matching = FeatureMatching(student_maps, teacher_maps, pairs) if pairs else None

            def loss(logits: Tensor, batch: Batch, task_loss: Callable[[Tensor], Tensor]) -> Tensor:
                with torch.no_grad():
                    targets = teacher.to(batch.image.device)(batch.image)
                own, taught = (said[head] for head in heads) if heads else (logits, logits)
                divergence = self._divergence(taught, targets, context.spec.labels)
                total = (1 - self.alpha) * task_loss(own) + self.alpha * divergence
                if matching is None:
                    return total
                return total + self.feature_weight * matching(student_maps, teacher_maps)

            trained = context.fit(
                student,
                name="distill",
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                hooks=FitHooks(loss=loss, auxiliary=matching),
            )
        return trained, {}

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Return `net`: distillation changes no structure."""
        return net

    def _divergence(self, logits: Tensor, teacher_logits: Tensor, labels: Labels) -> Tensor:
        if self.kind == "hard":
            return hard_divergence(logits, teacher_logits, labels=labels)
        return softened_divergence(
            logits, teacher_logits, temperature=self.temperature, labels=labels
        )

    def _pairs(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> dict[str, str]:
        if not self.feature_weight:
            return {}
        if self.features:
            return dict(self.features)
        return {deepest_features(student, images): deepest_features(teacher, images)}

    def _describe(self, teacher: nn.Module, pairs: Mapping[str, str]) -> str:
        size = sum(parameter.numel() for parameter in teacher.parameters())
        maps = ", ".join(f"{path} from {teacher_path}" for path, teacher_path in pairs.items())
        labels = "hard labels" if self.kind == "hard" else f"temperature {self.temperature}"
        return (
            f"teacher {type(teacher).__name__} of {size:,} parameters, {labels}, "
            f"alpha {self.alpha}"
            + (f", feature maps with weight {self.feature_weight}: {maps}" if maps else "")
        )


def softened_divergence(
    logits: Tensor, teacher_logits: Tensor, *, temperature: float, labels: Labels
) -> Tensor:
    """T^2 KL(teacher || student) of probabilities at temperature T, mean over images and pixels.

    Args:
        logits: (B, K[, H, W, D]) of the student.
        teacher_logits: the same shape.
        temperature: T; the factor T^2 keeps the size of the gradient (section 2 of the paper).
        labels: "multiclass" compares softmax distributions over K, otherwise each of the K
            logits gives a Bernoulli distribution, and the mean is over them too.
    """
    student, teacher = logits.float() / temperature, teacher_logits.float() / temperature
    if labels == "multiclass":
        divergence = F.kl_div(
            student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none"
        ).sum(1)
    else:
        probability = teacher.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(student, probability, reduction="none")
        entropy = F.binary_cross_entropy_with_logits(teacher, probability, reduction="none")
        divergence = cross_entropy - entropy
    return temperature**2 * divergence.mean()


def hard_divergence(logits: Tensor, teacher_logits: Tensor, *, labels: Labels) -> Tensor:
    """Cross entropy with the teacher's decisions, mean over images and pixels.

    Args:
        logits: (B, K[, H, W, D]) of the student.
        teacher_logits: the same shape.
        labels: "multiclass" decides for one of K, otherwise each logit for itself.
    """
    if labels == "multiclass":
        return F.cross_entropy(logits, teacher_logits.argmax(1))
    decisions = (teacher_logits > 0).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, decisions)


@torch.no_grad()
def _check_outputs(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    shapes = [tuple(net(images).shape[1:]) for net in (student, teacher)]
    if shapes[0] != shapes[1]:
        message = (
            f"distill.teacher: {type(teacher).__name__} gives logits of {shapes[1]} for an image, "
            f"the student {shapes[0]}; take a teacher for the same task"
        )
        raise MedliteError(message)
