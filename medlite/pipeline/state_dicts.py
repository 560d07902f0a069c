"""Weights from checkpoint files of several kinds, into nets that must fit them wholly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from medlite.errors import RecordError
from medlite.tasks.checkpoints import load_tensors

_NUM_NAMED = 3
"""keys that a message lists of each kind"""

_LIGHTNING_PREFIX = "net."
"""where `SupervisedTask` keeps the net"""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a file; nothing in it is executed.

    It may hold a state dict, one under "state_dict", a Lightning checkpoint of a medlite run, or
    an entry of the store that no step has restructured.

    Raises:
        RecordError: the file is damaged, holds more than tensors, or no weights.
    """
    content = load_tensors(path, mend="save its state_dict() alone and name that file")
    if not isinstance(content, dict):
        raise RecordError(_no_weights(path))
    if content.get("state"):
        message = f"{path} holds a compressed net; name the directory of its run as the teacher"
        raise RecordError(message)
    found: Any = content.get("weights", content.get("state_dict", content))
    if "pytorch-lightning_version" in content:
        found = {
            key.removeprefix(_LIGHTNING_PREFIX): value
            for key, value in found.items()
            if key.startswith(_LIGHTNING_PREFIX)
        }
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise RecordError(_no_weights(path))
    return found


def load_strictly(net: nn.Module, weights: Mapping[str, Any], *, whose: str) -> None:
    """Load all weights into `net`.

    Args:
        net: with names and shapes of its own.
        weights: to be copied.
        whose: how the message begins.

    Raises:
        RecordError: names or shapes differ; lists the first of each kind.
    """
    own = net.state_dict()
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in weights and _shape(value) != _shape(weights[key])
    ]
    kinds = {
        "missing": [key for key in own if key not in weights],
        "unknown": [key for key in weights if key not in own],
        "of another shape": shapes,
    }
    differences = [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds.items() if keys]
    if differences:
        message = f"{whose}: the weights do not fit: {'; '.join(differences)}"
        raise RecordError(message)
    net.load_state_dict(weights)


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:_NUM_NAMED]) + (", ..." if len(keys) > _NUM_NAMED else "")


def _no_weights(path: Path) -> str:
    return f"{path} holds no weights: expected a state dict, or one under 'state_dict'"
