"""The sections of the configuration that say how a compressed model is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class SafetyMargins:
    """How much worse a compressed model may be; stated before looking.

    A verdict is PASS when the whole 95 % interval of the loss lies below its margin, FAIL when
    it lies above, INCONCLUSIVE otherwise.
    """

    metric_drop: float = 0.02
    """task metric (Dice, AUC, accuracy), absolute"""
    sensitivity_drop: float = 0.05
    """any class"""
    ece_increase: float = 0.02
    nll_increase: float = 0.05
    specificity_drop: float | None = None
    """any class; None, here and below: shown, but not judged"""
    class_score_drop: float | None = None
    """AUC or Dice of any class"""
    brier_increase: float | None = None
    operating_sensitivity: float = 0.9
    """share of a class's validation images that the uncompressed model finds at the threshold at
    which both models are compared"""
    rare_prevalence: float = 0.1
    """classes with a smaller share of the training images (or foreground pixels) are named"""
    num_resamples: int = 2000
    enforce: bool = False
    """end the command with exit code 3 on FAIL; changes nothing of the run itself"""


@dataclass(kw_only=True)
class RobustnessSettings:
    """On which corrupted test images both models are compared."""

    enabled: bool = True
    num_images: int = 64
    """test images, spread evenly over the split; all where it has fewer"""
    severities: list[int] = field(default_factory=lambda: [1, 3, 5])
    """of 1 (barely visible) to 5 (hardly usable)"""
    corruptions: Any = "auto"
    """auto (what suits the dataset's modality) or a list of names"""


@dataclass(kw_only=True)
class ExplainabilitySettings:
    """How it is shown what the decisions of both models rest on."""

    enabled: bool = True
    num_images: int = 12
    """test images, spread evenly over the split; all where it has fewer"""
    methods: Any = "auto"
    """auto (all that apply) or a list: occlusion, integrated_gradients, grad_cam, rollout"""


@dataclass(kw_only=True)
class ShortcutSettings:
    """Whether both models are asked what they can tell without what they should look at."""

    enabled: bool = True
    num_images: int = 128
    """test images, spread evenly over the split; all where it has fewer"""
