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
    """The configuration without the paths in its `dataset` section.

    A string is taken for a path by its key (`root`, `csv`, `mask_dir` ...) or by its form.

    >>> redact_paths({"dataset": {"root": "jane_doe", "flag": "retinamnist"}})
    {'dataset': {'root': '<path>', 'flag': 'retinamnist'}}
    """
    if SECTION not in config:
        return dict(config)
    return {**config, SECTION: without_paths(config[SECTION])}


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
