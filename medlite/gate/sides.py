"""One side of a comparison, and how two of them are brought into the same order."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from medlite.errors import RecordError
from medlite.safety.operating_point import OperatingPoint
from medlite.types import DataSpec, Predictions


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one model said, and about which samples."""

    name: str
    """for people: the path, and the runtime of a run"""
    ids: tuple[str, ...]
    predictions: Predictions
    spec: DataSpec
    operating_points: tuple[OperatingPoint, ...] = ()
    """empty where validation images are not known"""


def match(first: Side, second: Side) -> Predictions:
    """What `second` said, in the order of `first`.

    Raises:
        RecordError: they are not about the same classes, samples, labels or patients.
    """
    for name in ("task", "labels", "class_names"):
        ours, theirs = getattr(first.spec, name), getattr(second.spec, name)
        if ours != theirs:
            message = (
                f"{first.name} and {second.name} differ in {name.replace('_', ' ')}: "
                f"{_words(ours)} and {_words(theirs)}; the gate compares two models of one task"
            )
            raise RecordError(message)
    for side in (first, second):
        _refuse_twice(side)
    place = {name: position for position, name in enumerate(second.ids)}
    lacking = [name for name in first.ids if name not in place]
    extra = sorted(place.keys() - set(first.ids))
    if lacking or extra:
        message = (
            f"{first.name} and {second.name} are not about the same samples: "
            f"{_some(lacking)} only in the first, {_some(extra)} only in the second; "
            "the gate pairs them by id"
        )
        raise RecordError(message)
    order = [place[name] for name in first.ids]
    said = second.predictions
    ordered = replace(
        said,
        logits=said.logits[order],
        targets=said.targets[order],
        groups=tuple(said.groups[position] for position in order),
    )
    _refuse_other_truth(first, second, ordered)
    return ordered


def _refuse_twice(side: Side) -> None:
    twice = [name for name, count in Counter(side.ids).items() if count > 1]
    if twice:
        message = f"{side.name}: {_some(twice)} more than once; ids must be unique"
        raise RecordError(message)


def _refuse_other_truth(first: Side, second: Side, ordered: Predictions) -> None:
    ours = first.predictions
    shapes = [side.targets.shape for side in (ours, ordered)]
    if shapes[0] != shapes[1]:
        message = f"{first.name} and {second.name} have labels of shapes {shapes[0]}, {shapes[1]}"
        raise RecordError(message)
    differs = (ours.targets != ordered.targets).reshape(len(ours.targets), -1).any(1)
    wrong = [first.ids[position] for position in np.flatnonzero(differs)]
    if wrong:
        message = f"{first.name} and {second.name} disagree on the labels of {_some(wrong)}"
        raise RecordError(message)
    pairs = zip(first.ids, ours.groups, ordered.groups, strict=True)
    moved = [name for name, before, after in pairs if before != after]
    if moved:
        message = (
            f"{first.name} and {second.name} disagree on the {first.spec.group_kind} of "
            f"{_some(moved)}"
        )
        raise RecordError(message)


def _some(names: list[str]) -> str:
    if not names:
        return "no id"
    return f"{len(names)} id{'s' * (len(names) > 1)} (such as {names[0]!r})"


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
