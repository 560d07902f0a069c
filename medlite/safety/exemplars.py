"""The test images on which a model and its compressed self agree least.

Pruning-identified exemplars (PIEs) of Hooker et al., "What Do Compressed Deep Neural Networks
Forget?", arXiv:1911.05248, as Holste et al., "How Does Pruning Impact Long-Tailed Multi-Label
Medical Image Classifiers?", MICCAI 2023 (arXiv:2308.09180), define them for scores: the 5 % of the
images with the lowest Spearman correlation between both models' vectors of class scores. Holste et
al. average the scores of 30 seeds; a run has those of its own, a comparison over seeds averages
them (`average_predictions`). A correlation of few scores takes few values, so fewer than MIN_SCORES
are compared by their Jensen-Shannon divergence, and masks by the Dice that each image loses. Images
on which nothing changed (or, of masks, got worse) are none.

Shapes: N samples, K logits, C classes, H W D height width depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import fisher_exact, rankdata
from scipy.stats.contingency import odds_ratio

from medlite.metrics import counts
from medlite.metrics.decisions import decisions, probabilities
from medlite.safety.statistics import holm

if TYPE_CHECKING:
    from torch import Tensor

    from medlite.types import DataSpec, Predictions

SHARE = 0.05
MIN_SCORES = 8

RULES = {
    "spearman": "1 - Spearman correlation of the class scores",
    "jensen_shannon": "Jensen-Shannon divergence of the class scores, in bits",
    "dice_drop": "mean Dice over the foreground classes that is lost",
}


@dataclass(frozen=True, kw_only=True)
class Exemplar:
    """One image; `position` is its place in the test split."""

    position: int
    disagreement: float


@dataclass(frozen=True, kw_only=True)
class Representation:
    """How often a class is among the exemplars, and among all other images."""

    class_name: str
    num_exemplars: int
    num_others: int
    odds_ratio: float | None
    """conditional maximum likelihood; None where it is not finite or the class not there"""
    interval: tuple[float | None, float | None]
    """95 %, exact; None: no end"""
    p_value: float
    """Fisher's exact test, two-sided, adjusted by Holm over the classes"""


@dataclass(frozen=True, kw_only=True)
class ExemplarReport:
    """The exemplars, the most different first, and the classes that they over-represent."""

    rule: str
    num_images: int
    exemplars: tuple[Exemplar, ...]
    classes: tuple[Representation, ...]
    """the foreground classes of a segmentation; none that all images have"""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"measure": RULES[self.rule]}


def find_exemplars(
    baseline: Predictions, compressed: Predictions, spec: DataSpec
) -> ExemplarReport | None:
    """Compare image by image; None where an output is not finite.

    Fisher's test takes images for independent, which those of one patient are not.

    Args:
        baseline: of the uncompressed model.
        compressed: on the same images in the same order.
        spec: the dataset.
    """
    if not all(np.isfinite(side.logits).all() for side in (baseline, compressed)):
        return None
    rule = rule_for(spec)
    disagreement = measure_disagreement(baseline, compressed, spec)
    order = np.argsort(-disagreement, kind="stable")[: int(SHARE * len(disagreement))]
    chosen = [int(position) for position in order if disagreement[position] > 0]
    exemplars = tuple(
        Exemplar(position=position, disagreement=float(disagreement[position]))
        for position in chosen
    )
    return ExemplarReport(
        rule=rule,
        num_images=len(disagreement),
        exemplars=exemplars,
        classes=represent(chosen, class_presence(baseline.targets, spec), spec.class_names),
    )


def average_predictions(sides: Sequence[Predictions], spec: DataSpec) -> Predictions:
    """Logits in float64 whose probabilities are the means of those of all sides.

    Probabilities of 0 and 1 become the nearest ones that have a finite logit.

    Args:
        sides: of models of several seeds, on the same images in the same order.
        spec: the dataset.
    """
    parts = (probabilities(torch.from_numpy(side.logits).double(), spec.labels) for side in sides)
    total = sum(parts, start=torch.zeros((), dtype=torch.float64))
    limits = torch.finfo(torch.float64)
    mean = torch.clamp(total / len(sides), limits.tiny, 1 - limits.eps)
    logits = mean.log() if spec.labels == "multiclass" else mean.log() - (-mean).log1p()
    return replace(sides[0], logits=logits.numpy())


def rule_for(spec: DataSpec) -> str:
    """A key of RULES: how a dataset's outputs are compared."""
    if spec.task == "segmentation":
        return "dice_drop"
    return "spearman" if spec.num_classes >= MIN_SCORES else "jensen_shannon"


def measure_disagreement(
    baseline: Predictions, compressed: Predictions, spec: DataSpec
) -> np.ndarray:
    """How differently both models see each image, (N,); at most 0 where nothing was lost."""
    rule = rule_for(spec)
    if rule == "dice_drop":
        drop = _dice(baseline, spec) - _dice(compressed, spec)
        return drop.nan_to_num(0).numpy()  # without foreground there is no Dice to lose
    first, second = (
        probabilities(torch.from_numpy(side.logits).double(), spec.labels).numpy()
        for side in (baseline, compressed)
    )
    if rule == "spearman":
        return 1 - rank_correlation(first, second)
    if spec.labels == "multiclass":
        return jensen_shannon(first, second)
    pairs = (np.stack((side, 1 - side), axis=-1) for side in (first, second))
    return jensen_shannon(*pairs).mean(axis=1)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row, (N, K) and (N, K) -> (N,); 1 where a row has no order.

    Ties share their mean rank. A constant row correlates with nothing: it counts as 1 beside
    another constant one, otherwise as 0.
    """
    ranks = [rankdata(side, axis=1) for side in (first, second)]
    centred = [rank - rank.mean(axis=1, keepdims=True) for rank in ranks]
    norms = [np.linalg.norm(each, axis=1) for each in centred]
    product = norms[0] * norms[1]
    is_known = product > 0
    correlation = (centred[0] * centred[1]).sum(axis=1) / np.where(is_known, product, 1)
    correlation = np.where(is_known, np.minimum(correlation, 1), 0)
    # Equal ranks are told by themselves: their correlation may round to just below 1.
    return np.where((ranks[0] == ranks[1]).all(axis=1), 1, correlation)


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Divergence of distributions along the last axis in bits, (..., K) -> (...), in [0, 1].

    Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    middle = (first + second) / 2
    divergence = (_relative_entropy(first, middle) + _relative_entropy(second, middle)) / 2
    return np.clip(divergence, 0, 1)


def class_presence(targets: np.ndarray, spec: DataSpec) -> np.ndarray:
    """Which images have which class, bool (N, C)."""
    if spec.labels == "multilabel":
        return targets > 0
    flat = targets.reshape(len(targets), -1)
    return np.stack([(flat == c).any(axis=1) for c in range(len(spec.class_names))], axis=1)


def represent(
    chosen: Sequence[int], has_class: np.ndarray, class_names: Sequence[str]
) -> tuple[Representation, ...]:
    """Each class's odds among the chosen images against those among the others.

    Args:
        chosen: positions.
        has_class: bool (N, C).
        class_names: C.
    """
    is_chosen = np.zeros(len(has_class), dtype=bool)
    is_chosen[list(chosen)] = True
    varying = [c for c in range(len(class_names)) if 0 < has_class[:, c].sum() < len(has_class)]
    if not chosen or not varying:
        return ()
    tables = [_two_by_two(is_chosen, has_class[:, c]) for c in varying]
    p_values = holm([float(fisher_exact(table).pvalue) for table in tables])
    return tuple(
        _representation(class_names[c], table, p_value)
        for c, table, p_value in zip(varying, tables, p_values, strict=True)
    )


def _two_by_two(is_chosen: np.ndarray, has: np.ndarray) -> np.ndarray:
    return np.array(
        [
            [(is_chosen & has).sum(), (is_chosen & ~has).sum()],
            [(~is_chosen & has).sum(), (~is_chosen & ~has).sum()],
        ]
    )


def _representation(name: str, table: np.ndarray, p_value: float) -> Representation:
    result = odds_ratio(table, kind="conditional")
    ends = result.confidence_interval(0.95)
    return Representation(
        class_name=name,
        num_exemplars=int(table[0, 0]),
        num_others=int(table[1, 0]),
        odds_ratio=_finite(result.statistic),
        interval=(_finite(ends.low), _finite(ends.high)),
        p_value=p_value,
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _relative_entropy(distribution: np.ndarray, other: np.ndarray) -> np.ndarray:
    ratio = np.divide(distribution, other, out=np.ones_like(other), where=distribution > 0)
    return (distribution * np.log2(ratio)).sum(axis=-1)


def _dice(predictions: Predictions, spec: DataSpec) -> Tensor:
    """Mean Dice over the foreground classes of each image, (N,); NaN without foreground."""
    of_samples = counts.class_counts(
        decisions(torch.from_numpy(predictions.logits), spec.labels),
        torch.from_numpy(predictions.targets),
        labels=spec.labels,
        num_classes=len(spec.class_names),
    )
    return counts.mean_foreground_dice(of_samples)
