"""What the gate looks at for a dataset: losses with a margin are judged, the others are shown."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from medlite.errors import ConfigError
from medlite.metrics.distance import surface_name
from medlite.metrics.names import class_keys
from medlite.metrics.task import primary_metric

if TYPE_CHECKING:
    from medlite.safety_settings import SafetyMargins
    from medlite.types import DataSpec

MIN_RESAMPLES = 500
"""fewer leave too little beyond the ends of a 95 % interval"""

REQUIRED = ("metric_drop", "sensitivity_drop", "ece_increase", "nll_increase")
OPTIONAL = ("specificity_drop", "class_score_drop", "brier_increase")
BELOW_ONE = ("sensitivity_drop", "specificity_drop")
PROPORTIONS = (*BELOW_ONE, "sensitivity_at_point_drop", "specificity_at_point_drop")
SHARES = ("operating_sensitivity", "rare_prevalence")


class Check(NamedTuple):
    """One score, how much of it may be lost (None: it is only shown), and its class if any."""

    name: str
    score: str
    margin: float | None
    higher_is_better: bool
    position: int | None = None

    @property
    def family(self) -> str:
        """The checks of one kind are corrected together: `sensitivity_drop`, ..."""
        return self.name.split("/")[1]


def check_margins(margins: SafetyMargins) -> None:
    """Refuse margins that could never be met.

    Raises:
        ConfigError: with every problem.
    """
    stated = {name: getattr(margins, name) for name in (*REQUIRED, *OPTIONAL)}
    problems = [
        f"safety.{name}: {value:g} is not above 0: no number of patients shows a loss of nothing"
        for name, value in stated.items()
        if value is not None and value <= 0
    ]
    problems += [
        f"safety.{name}: {stated[name]:g} is not below 1"
        for name in BELOW_ONE
        if stated[name] is not None and stated[name] >= 1
    ]
    problems += [
        f"safety.{name}: {getattr(margins, name):g} is not in (0, 1]"
        for name in SHARES
        if not 0 < getattr(margins, name) <= 1
    ]
    if margins.num_resamples < MIN_RESAMPLES:
        problems.append(
            f"safety.num_resamples: {margins.num_resamples} is below {MIN_RESAMPLES}, "
            "too few for a 95 % interval"
        )
    if problems:
        raise ConfigError(problems)


def plan(spec: DataSpec, margins: SafetyMargins, at_point: Collection[str] = ()) -> list[Check]:
    """All that is compared, the task metric first; distances aside, which need both models.

    Args:
        spec: the dataset.
        margins: how much of each may be lost.
        at_point: keys of the classes that have an operating point.
    """
    is_segmentation = spec.task == "segmentation"
    keys = list(enumerate(class_keys(spec.class_names)))
    foreground = keys[1:] if is_segmentation else keys
    checks = [
        Check("safety/metric_drop", primary_metric(spec), margins.metric_drop, True),
        Check("safety/ece_increase", "ece", margins.ece_increase, False),
        Check("safety/nll_increase", "nll", margins.nll_increase, False),
    ]
    for position, key in foreground:
        name, score = f"safety/sensitivity_drop/{key}", f"sensitivity/{key}"
        checks.append(Check(name, score, margins.sensitivity_drop, True, position))
    for position, key in foreground:
        name, score = f"safety/specificity_drop/{key}", f"specificity/{key}"
        checks.append(Check(name, score, margins.specificity_drop, True, position))
    for position, key in foreground:
        if key in at_point:
            checks += point_checks(position, key, margins)
    class_score = "dice" if is_segmentation else "auc"
    scored = keys[1:] if is_segmentation or spec.labels == "binary" else keys
    for position, key in scored:
        name, score = f"safety/{class_score}_drop/{key}", f"{class_score}/{key}"
        checks.append(Check(name, score, margins.class_score_drop, True, position))
    checks.append(Check("safety/brier_increase", "brier", margins.brier_increase, False))
    return checks + shown_only(spec, scored)


def point_checks(position: int, key: str, margins: SafetyMargins) -> list[Check]:
    """What is lost of a class at its operating point, with the margins of its decisions."""
    limits = {"sensitivity": margins.sensitivity_drop, "specificity": margins.specificity_drop}
    return [
        Check(f"safety/{name}_at_point_drop/{key}", f"{name}_at_point/{key}", limit, True, position)
        for name, limit in limits.items()
    ]


def shown_only(spec: DataSpec, scored: list[tuple[int, str]]) -> list[Check]:
    """The losses that have no margin of their own."""
    if spec.task == "segmentation":
        drops = ["iou", "dice_per_image"]
        increases = ["ece_adaptive"]
        by_class = [(surface_name(spec.spacing_mm), True)]
        by_class += [("ece", False)] if len(scored) > 1 else []
    else:
        drops = ["ap", "accuracy", "balanced_accuracy"]
        increases = ["ece_adaptive"]
        increases += ["ece_classwise"] if spec.labels == "multiclass" else []
        by_class = [("ap", True)] if len(scored) > 1 else []
    checks = [Check(f"safety/{name}_drop", name, None, True) for name in drops]
    checks += [Check(f"safety/{name}_increase", name, None, False) for name in increases]
    for name, is_drop in by_class:
        loss = "drop" if is_drop else "increase"
        checks += [
            Check(f"safety/{name}_{loss}/{key}", f"{name}/{key}", None, is_drop, position)
            for position, key in scored
        ]
    return checks
