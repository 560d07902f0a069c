"""Keep paths out of what leaves the run directory: folders of medical data may name patients."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

PLACEHOLDER = "<path>"
SECTION = "dataset"
PATH_KEY = re.compile(r"(^|_)(root|path|paths|file|files|csv|dir|directory|folder)$")
PATH_VALUE = re.compile(r"[/\\]|^[~.]|\.(csv|tsv|json|npz|npy|png|jpe?g|tiff?|dcm|nii|gz|zip|h5)$")


def redact_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the paths in its `dataset` section and of teachers.

    A string is taken for a path by its key (`root`, `csv`, `mask_dir` ...) or by its form.

    >>> redact_paths({"dataset": {"root": "jane_doe", "flag": "retinamnist"}})
    {'dataset': {'root': '<path>', 'flag': 'retinamnist'}}
    """
    redacted = dict(config)
    if SECTION in config:
        redacted[SECTION] = without_paths(config[SECTION])
    if "compression" in config:
        redacted["compression"] = {
            name: without_teachers_path(step) for name, step in config["compression"].items()
        }
    return redacted


def without_teachers_path(step: Any) -> Any:
    """A step whose teachers are named without where they lie.

    >>> without_teachers_path({"teacher": ["unet", "unet@jane/best.ckpt", "timm/resnet18"]})
    {'teacher': ['unet', 'unet@<path>', 'timm/resnet18']}
    """
    if not isinstance(step, Mapping) or "teacher" not in step:
        return step
    teacher = step["teacher"]
    names = [teacher] if isinstance(teacher, str) else teacher
    shown = [_without_path(name) for name in names]
    return {**step, "teacher": shown[0] if isinstance(teacher, str) else shown}


def _without_path(teacher: str) -> str:
    option, at, _ = teacher.partition("@")
    if at:
        return f"{option}@{PLACEHOLDER}"
    is_path = PATH_VALUE.search(teacher) and not teacher.startswith("timm/")
    return PLACEHOLDER if is_path else teacher


def without_paths(value: Any, key: str = "") -> Any:
    """Replace every path, at any depth; `_target_` is a Python name and stays."""
    if key == "_target_":
        return value
    if isinstance(value, Mapping):
        return {name: without_paths(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item, key) for item in value]
    is_path = isinstance(value, PurePath) or (
        isinstance(value, str) and bool(PATH_KEY.search(key) or PATH_VALUE.search(value))
    )
    return PLACEHOLDER if is_path else value
