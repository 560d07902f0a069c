"""What a search over precisions must not spoil, measured on validation images.

Shapes: N samples, K logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from medlite.errors import MedliteError
from medlite.metrics.statistics import GroupedScores, grouped_scores
from medlite.metrics.task import primary_metric
from medlite.types import Batch, DataSpec, Predictions

OBJECTIVES = ("metric", "worst_sensitivity", "ece", "nll")
LOWER_IS_BETTER = ("ece", "nll")


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the objective says of some logits: NaN where an output is not finite.

    sensitivities: class -> its own, NaN of one that does not occur; empty for other objectives.
    """

    value: float
    sensitivities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClinicalObjective:
    """One number for a model's logits on fixed images, and how much worse another number is.

    Args:
        kind: "metric" is the task's own (mean foreground Dice, macro AUC); "worst_sensitivity"
            the lowest of any class that occurs, and what any class loses of its own; "ece" and
            "nll" judge the confidence.
        spec: of the data.
        batches: the images with their targets; every image counts once, whoever's it is.
    """

    kind: str
    spec: DataSpec
    batches: Sequence[Batch]

    @property
    def name(self) -> str:
        """For reports: "dice", "auc", "worst sensitivity", "ece" or "nll"."""
        return primary_metric(self.spec) if self.kind == "metric" else self.kind.replace("_", " ")

    @property
    def num_images(self) -> int:
        """N."""
        return sum(len(batch.image) for batch in self.batches)

    @torch.no_grad()
    def logits(self, net: nn.Module) -> Tensor:
        """What a net on the CPU says of the images, (N, K, ...) float32."""
        return torch.cat([net(batch.image) for batch in self.batches])

    def score(self, logits: Tensor) -> Score:
        """Measure logits of all images.

        Raises:
            MedliteError: the classes that it needs do not occur among the images.
        """
        if not logits.isfinite().all():
            return Score(value=math.nan)
        targets = torch.cat([batch.target for batch in self.batches]).numpy()
        groups = tuple(map(str, range(len(targets))))
        predictions = Predictions(logits=logits.numpy(), targets=targets, groups=groups)
        score = self._score(grouped_scores(predictions, self.spec))
        if math.isnan(score.value):
            message = (
                f"objective={self.kind}: {self.name} cannot be measured on {self.num_images} "
                "validation images, in which too few classes occur; raise validation_batches or "
                "choose objective=nll"
            )
            raise MedliteError(message)
        return score

    def loss(self, score: Score, reference: Score) -> float:
        """How much worse `score` is than `reference`, negative where it is better.

        Of sensitivities the largest loss of any one class: the worst class alone would hide it
        where another is worse still, or found by neither.
        """
        if math.isnan(score.value) or math.isnan(reference.value):
            return math.inf
        if self.kind == "worst_sensitivity":
            return max(self.losses(score, reference).values())
        worse = score.value - reference.value
        return worse if self.kind in LOWER_IS_BETTER else -worse

    def losses(self, score: Score, reference: Score) -> dict[str, float]:
        """By how much the sensitivity of each class that occurs fell, the largest first."""
        before, after = reference.sensitivities, score.sensitivities
        losses = {name: before[name] - after[name] for name in before if before[name] >= 0}
        return dict(sorted(losses.items(), key=lambda item: -item[1]))

    def _score(self, scores: GroupedScores) -> Score:
        if self.kind != "worst_sensitivity":
            name = primary_metric(self.spec) if self.kind == "metric" else self.kind
            return Score(value=scores.value(name))
        found = {
            name.removeprefix("sensitivity/"): scores.value(name)
            for name in scores.statistics
            if name.startswith("sensitivity/")
        }
        return Score(value=float(np.nanmin(list(found.values()))), sensitivities=found)


def noise_ratio(logits: Tensor, reference: Tensor) -> float:
    """Power of the error over power of the signal; infinite where an output is not finite."""
    error = (logits - reference).double().square().sum()
    ratio = float(error / reference.double().square().sum().clamp_min(1e-30))
    return ratio if math.isfinite(ratio) else math.inf
