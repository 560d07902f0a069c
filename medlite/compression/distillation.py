"""Distillation: the net learns from a larger, trained one, and keeps its own structure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medlite.compression.checks import check_options, training_rules
from medlite.compression.copies import evaluation_copy
from medlite.compression.divergence_weights import balanced_weights, decided_classes, near_boundary
from medlite.compression.ensemble import Ensemble
from medlite.compression.feature_maps import deepest_features, tapped
from medlite.compression.map_terms import MapWeights, map_terms
from medlite.compression.order import Stage
from medlite.compression.teacher_divergence import hard_divergence, softened_divergence
from medlite.errors import MedliteError
from medlite.types import Batch, CompressionContext, DataSpec, FitHooks

_NOTHING_TAUGHT = (
    "above 0: without feature_weight and rank_weight the teacher would teach nothing; take "
    "compression=finetune to train on without one"
)
_UNUSED_MAPS = "read with feature_weight=0 and rank_weight=0; set one of them above 0"


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.

    loss = (1 - alpha) task_loss + alpha T^2 KL(teacher || student) + feature_weight distance
    + rank_weight ranking, with softened probabilities of logits / T. For segmentation the
    divergence is the mean over pixels; for binary and multi-label tasks each logit is a
    distribution of its own. A teacher passes on its mistakes too: what it misses of a rare
    class the student may unlearn; `class_weights` is the remedy.

    With `kind="hard"` the teacher's decision is a second label, and the divergence the cross
    entropy with it (Touvron et al., "Training data-efficient image transformers", arXiv
    2012.12877, equation 3). A student with a distillation token (DeiT, and others that name
    their `distillation_heads`) hears its teacher through the token's head alone and the labels
    through the other one; in evaluation it answers with the mean of both.

    With `boundary_weight` the pixels near a boundary weigh 1 + boundary_weight in the
    divergence. That is our own form; Liu et al., "BPKD", arXiv:2306.08075, distil edges and
    bodies by separate losses, and Ronneberger et al., "U-Net", arXiv:1505.04597, equation 2,
    let weights of the task's loss fall with the distance to borders.

    Args:
        epochs: epochs of distillation; the student starts from its trained weights.
        learning_rate: peak learning rate.
        kind: soft or hard.
        teacher: what teaches, or a list of them whose mean does (see `Ensemble`). A model
            option, or `timm/NAME` with timm's weights: trained by the run's own settings and
            kept in the store; "auto" takes unet for segmentation, resnet18 for classification.
            A run directory or its result.json: that run's last float net. `MODEL@FILE`: a
            model option with the weights of a checkpoint.
        temperature: T, at least 1 softens; of the soft kind.
        alpha: share of the teacher in the loss of the logits, in [0, 1]. With 0 they are not
            compared, and a finished run of another task may teach by its maps.
        class_weights: none, or balanced: the divergence is a mean weighted by the label's class
            (inverse training frequency, mean 1).
        boundary_weight: how much more the pixels near a boundary weigh; 0: all the same.
        boundary_width_px: pixels of the band on each side of a boundary.
        boundary_of: label, or teacher: where its decisions change.
        feature_weight: weight of the distance between feature maps; 0: none.
        rank_weight: weight of the ranking of places by importance (see `RankMatching`); 0: none.
        rank_top: places of an image that are ranked, the teacher's most important ones.
        features: student module -> teacher module, by path, for both; by default the deepest
            map of each (see `deepest_features`). Of several teachers the first one's.
    """

    stage: ClassVar[Stage] = "train"

    epochs: int
    learning_rate: float
    kind: str = "soft"
    teacher: str | Sequence[str] = "auto"
    temperature: float = 2.0
    alpha: float = 0.5
    class_weights: str = "none"
    boundary_weight: float = 0.0
    boundary_width_px: int = 2
    boundary_of: str = "label"
    feature_weight: float = 0.0
    rank_weight: float = 0.0
    rank_top: int = 32
    features: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(
            [
                *training_rules(self.epochs, self.learning_rate),
                *_one_of("kind", self.kind, ("soft", "hard")),
                ("teacher", self.teacher, _is_named(self.teacher), "a name or a list of names"),
                ("temperature", self.temperature, self.temperature > 0, "above 0"),
                ("alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]"),
                ("alpha", self.alpha, bool(self.alpha or self._compares_maps), _NOTHING_TAUGHT),
                ("features", self.features, self._compares_maps or not self.features, _UNUSED_MAPS),
                *_one_of("class_weights", self.class_weights, ("none", "balanced")),
                *_one_of("boundary_of", self.boundary_of, ("label", "teacher")),
                ("boundary_weight", self.boundary_weight, self.boundary_weight >= 0, "0 or above"),
                ("boundary_width_px", self.boundary_width_px, self.boundary_width_px >= 1, "1 up"),
                *self._rules_of_logits(),
                ("feature_weight", self.feature_weight, self.feature_weight >= 0, "0 or above"),
                ("rank_weight", self.rank_weight, self.rank_weight >= 0, "0 or above"),
                ("rank_top", self.rank_top, self.rank_top >= 2, "2 or above"),
            ]
        )

    @property
    def compares_logits(self) -> bool:
        """Whether the teacher must know the same classes."""
        return self.alpha > 0

    @property
    def _compares_maps(self) -> bool:
        return bool(self.feature_weight or self.rank_weight)

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the distilled net, without the teacher and the adapters; `net` stays as it is.

        Raises:
            MedliteError: teacher and student, or a weight and the task, do not go together.
        """
        self._check_task(context.spec)
        student = evaluation_copy(net)
        teacher = self._softened(context.build_teacher().eval().requires_grad_(False))
        images = torch.zeros(2, *context.spec.input_shape)
        if self.compares_logits:
            for each in _members(teacher):
                _check_outputs(student, each, images)
        pairs = self._pairs(student, teacher, images)
        context.report("distillation", self._describe(teacher, pairs))
        weights = MapWeights(self.feature_weight, self.rank_weight, self.rank_top)
        heads = list(getattr(student, "distillation_heads", None) or ())
        with (
            tapped(student, heads, "distillation_heads") as said,
            map_terms(
                student, _members(teacher)[0], pairs, images=images, weights=weights
            ) as of_maps,
        ):

            def loss(logits: Tensor, batch: Batch, task_loss: Callable[[Tensor], Tensor]) -> Tensor:
                own, taught = (said[head] for head in heads) if heads else (logits, logits)
                with torch.no_grad():
                    targets = teacher.to(batch.image.device)(batch.image)
                total = task_loss(own)
                if self.compares_logits:
                    divergence = self._divergence(taught, targets, batch.target, context.spec)
                    total = (1 - self.alpha) * total + self.alpha * divergence
                return total + of_maps.total() if pairs else total

            trained = context.fit(
                student,
                name="distill",
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                hooks=FitHooks(loss=loss, auxiliary=of_maps.adapters),
            )
        return trained, {}

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Return `net`: distillation changes no structure."""
        return net

    def _rules_of_logits(self) -> Iterator[tuple[str, Any, bool, str]]:
        unused = "needed with alpha=0, which does not compare logits"
        is_balanced, is_one = self.class_weights == "balanced", isinstance(self.teacher, str)
        for option, is_used in (
            ("boundary_weight", self.boundary_weight > 0),
            ("class_weights", is_balanced),
            ("teacher", not is_one and len(self.teacher) > 1),
        ):
            yield option, getattr(self, option), self.compares_logits or not is_used, unused

    def _check_task(self, spec: DataSpec) -> None:
        if self.boundary_weight and spec.task != "segmentation":
            message = (
                f"distill.boundary_weight: {self.boundary_weight:g} weighs pixels, and "
                f"dataset={spec.name} is for {spec.task}; set distill.boundary_weight=0"
            )
            raise MedliteError(message)

    def _softened(self, teacher: nn.Module) -> nn.Module:
        if self.kind == "soft" and isinstance(teacher, Ensemble):
            return teacher.at(self.temperature)
        return teacher

    def _divergence(
        self, logits: Tensor, teacher_logits: Tensor, target: Tensor, spec: DataSpec
    ) -> Tensor:
        weights = self._weights(teacher_logits, target, spec)
        if self.kind == "hard":
            return hard_divergence(logits, teacher_logits, labels=spec.labels, weights=weights)
        return softened_divergence(
            logits,
            teacher_logits,
            temperature=self.temperature,
            labels=spec.labels,
            weights=weights,
        )

    def _weights(self, teacher_logits: Tensor, target: Tensor, spec: DataSpec) -> Tensor | None:
        """(B, 1[, H, W, D]) or (B, K); None where all weigh the same."""
        weights = balanced_weights(target, spec) if self.class_weights == "balanced" else None
        if not self.boundary_weight:
            return weights
        is_labels = self.boundary_of == "label"
        classes = target if is_labels else decided_classes(teacher_logits, spec.labels)
        is_near = near_boundary(classes, width_px=self.boundary_width_px).unsqueeze(1)
        near = 1 + self.boundary_weight * is_near
        return near if weights is None else near * weights

    def _pairs(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> dict[str, str]:
        if not self._compares_maps:
            return {}
        if self.features:
            return dict(self.features)
        return {deepest_features(student, images): deepest_features(_members(teacher)[0], images)}

    def _describe(self, teacher: nn.Module, pairs: Mapping[str, str]) -> str:
        size = sum(parameter.numel() for parameter in teacher.parameters())
        name = " and ".join(type(member).__name__ for member in _members(teacher))
        labels = "hard labels" if self.kind == "hard" else f"temperature {self.temperature}"
        parts = [f"teacher {name} of {size:,} parameters", labels, f"alpha {self.alpha}"]
        if self.class_weights == "balanced":
            parts.append("classes balanced")
        if self.boundary_weight:
            parts.append(
                f"{1 + self.boundary_weight:g} times the weight within {self.boundary_width_px} px "
                f"of boundaries of the {self.boundary_of}"
            )
        maps = ", ".join(f"{path} from {teacher_path}" for path, teacher_path in pairs.items())
        if self.feature_weight:
            parts.append(f"feature maps with weight {self.feature_weight}: {maps}")
        if self.rank_weight:
            parts.append(f"ranks of {self.rank_top} places with weight {self.rank_weight}: {maps}")
        return ", ".join(parts)


def _members(teacher: nn.Module) -> list[nn.Module]:
    return list(teacher.members) if isinstance(teacher, Ensemble) else [teacher]


def _one_of(
    option: str, value: str, allowed: Sequence[str]
) -> Iterable[tuple[str, Any, bool, str]]:
    return [(option, value, value in allowed, " or ".join(allowed))]


def _is_named(teacher: Any) -> bool:
    names = [teacher] if isinstance(teacher, str) else teacher
    return bool(names) and all(isinstance(name, str) and name for name in names)


@torch.no_grad()
def _check_outputs(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    shapes = [tuple(net(images).shape[1:]) for net in (student, teacher)]
    if shapes[0] != shapes[1]:
        message = (
            f"distill.teacher: {type(teacher).__name__} gives logits of {shapes[1]} for an image, "
            f"the student {shapes[0]}; take a teacher for the same task"
        )
        raise MedliteError(message)
