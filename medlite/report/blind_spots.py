"""Classes that a teacher finds less often than its student did before it was taught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medlite.metrics.names import class_keys
from medlite.report.lookup import Lookup


@dataclass(frozen=True, kw_only=True)
class BlindSpot:
    """One class, with its sensitivity in torch on the test split."""

    class_name: str
    teacher: float
    baseline: float

    def __str__(self) -> str:
        return (
            f"Blind spot: the teacher finds {self.teacher:.3f} of {self.class_name}, less than "
            f"the student's baseline with {self.baseline:.3f}"
        )


def find_blind_spots(found: Lookup, class_names: Sequence[str]) -> list[BlindSpot]:
    """Every class whose sensitivity is lower in the teacher, compared to three decimals.

    A difference says nothing of its cause, and few images of a class make large ones: the
    intervals stand beside the values. Distillation may pass a blind spot on.
    """
    spots = []
    for name, key in zip(class_names, class_keys(class_names), strict=True):
        pair = [found.get(f"{who}/test/sensitivity/{key}") for who in ("teacher", "baseline")]
        teacher, baseline = (None if each is None else each.value for each in pair)
        if teacher is None or baseline is None or round(teacher, 3) >= round(baseline, 3):
            continue
        spots.append(BlindSpot(class_name=name, teacher=teacher, baseline=baseline))
    return spots
