"""The metrics that training watches, as torchmetrics that take (logits, target).

Shapes: B batch, C classes, K logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from medlite.metrics import counts
from medlite.metrics.decisions import decisions, probabilities
from medlite.metrics.ranking import macro_auc, one_vs_rest

if TYPE_CHECKING:
    from medlite.types import DataSpec, Labels


class CountScore(Metric):
    """A score of counts pooled over everything seen, such as the Dice of a whole set.

    torchmetrics' own classes score a class that is absent from the targets as 0 and take logits
    for probabilities when a whole batch lies in [0, 1]; this one leaves the class out and is
    never in doubt. In [0, 1], higher is better, NaN when no class of the score occurs.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(
        self, *, labels: Labels, num_classes: int, formula: Callable[[Tensor], Tensor]
    ) -> None:
        """See the class.

        Args:
            labels: what the logits mean.
            num_classes: C; 2 for "binary".
            formula: (C, 4) counts, see `medlite.metrics.counts`, to the score.
        """
        super().__init__()
        self.labels: Labels = labels
        self.num_classes = num_classes
        self.formula = formula
        zeros = torch.zeros(num_classes, 4, dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits (B, K, ...), target as in `Batch`."""
        decided = decisions(logits, self.labels)
        self.counts += counts.class_counts(
            decided, target, labels=self.labels, num_classes=self.num_classes
        ).sum(0)

    def compute(self) -> Tensor:
        """The score of all batches together."""
        return self.formula(self.counts)


class MacroAUC(Metric):
    """Exact one-vs-rest area under the ROC curve, averaged over classes as MedMNIST does.

    In [0, 1], higher is better. Keeps every prediction (torchmetrics' binned AUROC would not,
    but is off by up to a bin). A class without positives or negatives is left out of the mean;
    NaN when none remains.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    probability: list[Tensor]
    is_positive: list[Tensor]

    def __init__(self, *, labels: Labels) -> None:
        super().__init__()
        self.labels: Labels = labels
        self.add_state("probability", [], dist_reduce_fx="cat")
        self.add_state("is_positive", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits (B, K), target as in `Batch`."""
        self.probability.append(probabilities(logits.double(), self.labels))
        self.is_positive.append(one_vs_rest(target, labels=self.labels, num_logits=logits.shape[1]))

    def compute(self) -> Tensor:
        """The area of all batches together."""
        probability = dim_zero_cat(self.probability).cpu()  # CUDA's cumsum is not deterministic
        is_positive = dim_zero_cat(self.is_positive).cpu()
        weights = probability.new_ones(1, len(probability))
        return macro_auc(probability, is_positive, weights)[0].float().to(self.device)


def primary_metric(spec: DataSpec) -> str:
    """The metric that picks checkpoints and that the safety gate guards: "dice" or "auc"."""
    return "dice" if spec.task == "segmentation" else "auc"


def count_formulas(spec: DataSpec) -> dict[str, Callable[[Tensor], Tensor]]:
    """The scores of a dataset's task that follow from counts, (..., C, 4) -> (...)."""
    if spec.task == "segmentation":
        return {"dice": counts.mean_foreground_dice, "iou": counts.mean_foreground_iou}
    if spec.labels == "multilabel":
        return {
            "accuracy": counts.multilabel_accuracy,
            "balanced_accuracy": counts.multilabel_balanced_accuracy,
        }
    return {
        "accuracy": counts.exclusive_accuracy,
        "balanced_accuracy": counts.exclusive_balanced_accuracy,
    }


def build_metrics(spec: DataSpec) -> MetricCollection:
    """What to watch while training on `spec`; call it with (logits, target).

    Segmentation: "dice" and "iou", pooled over all pixels of the set and averaged over the
    foreground classes. Classification: "auc", "accuracy", "balanced_accuracy". A class that is
    absent from the targets is left out of every mean.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        name: CountScore(labels=spec.labels, num_classes=len(spec.class_names), formula=formula)
        for name, formula in count_formulas(spec).items()
    }
    if spec.task == "classification":
        metrics["auc"] = MacroAUC(labels=spec.labels)
    return MetricCollection(metrics)
