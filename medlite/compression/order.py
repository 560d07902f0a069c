"""Which compression steps may follow each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import combinations
from typing import Any, Literal

Stage = Literal["structure", "train", "numeric", "calibrate"]
"""structure: channels or layers go. train: only weights change. numeric: the arithmetic changes,
and the result is a fixed graph in which nothing can be trained or cut any more. calibrate: only
the logits of the finished net change."""


def check_order(steps: Mapping[str, Any]) -> list[str]:
    """What is wrong with an order of steps, in words; empty where it can run.

    Structure and training steps may come in any order, each once; one numeric step may end them,
    and behind everything the logits may be calibrated. Nothing that trains or changes layers may
    come behind a step that leaves zeros: they would be filled without a word.

    Args:
        steps: the steps by name, in the order in which they are to be applied. A step, or its
            class, says where it belongs by its attribute `stage`.

    >>> class Prune:
    ...     stage = "structure"
    >>> class Qat:
    ...     stage = "numeric"
    >>> check_order({"prune": Prune, "qat": Qat})
    []
    >>> check_order({"qat": Qat, "prune": Prune})[0][:44]
    "compression: 'prune' cannot follow 'qat', wh"
    """
    pairs = combinations(steps.items(), 2)
    return [problem for earlier, later in pairs for problem in _problems(*earlier, *later)]


def _problems(name: str, step: Any, later_name: str, later: Any) -> list[str]:
    if _kind(step) is _kind(later):
        return [f"compression: '{name}' and '{later_name}' are the same step; give it once"]
    if step.stage == "calibrate":
        return [
            f"compression: '{later_name}' cannot follow '{name}', which fits the logits of the "
            f"finished net; put '{name}' last"
        ]
    if getattr(step, "leaves_zeros", False) and _changes_weights(later):
        is_last = later.stage == "numeric"
        return [
            f"compression: '{later_name}' cannot follow '{name}', whose zeros it would fill; "
            + ("take ptq in its place" if is_last else f"put it before '{name}'")
        ]
    if step.stage != "numeric" or later.stage == "calibrate":
        return []
    if later.stage == "numeric":
        return [
            f"compression: '{name}' and '{later_name}' both choose the arithmetic; give one of them"
        ]
    return [
        f"compression: '{later_name}' cannot follow '{name}', whose result is a fixed graph; "
        f"put '{name}' last"
    ]


def _changes_weights(step: Any) -> bool:
    """Whether a step trains, or puts other layers into the place of those that were there."""
    options = {option.name for option in fields(step)} if is_dataclass(step) else vars(step)
    return step.stage in ("structure", "train") or "epochs" in options


def _kind(step: Any) -> type:
    return step if isinstance(step, type) else type(step)
