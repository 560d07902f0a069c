"""Columns of a csv or parquet file -> the arrays of an npz file of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medlite.errors import RecordError

KINDS = {"probability": "probabilities", "logit": "logits"}


def columns_to_arrays(columns: Mapping[str, Sequence[Any]], path: Path) -> dict[str, np.ndarray]:
    """Gather `probability_<class>` (or `logit_<class>`) into one array, and name the classes.

    Raises:
        RecordError: a value is not a number, or a label not a class.
    """
    arrays = {name: np.array(columns[name]) for name in ("id", "patient") if name in columns}
    for prefix, name in KINDS.items():
        scores = _beginning_with(prefix, columns)
        if not scores:
            continue
        arrays[name] = _numbers(scores, columns, path)
        named = tuple(key.removeprefix(prefix).removeprefix("_") for key in scores)
        classes = _class_names(named)
        if classes is not None:
            arrays["class_names"] = np.array(classes)
    labels = _beginning_with("label_", columns)
    if labels:
        arrays["label"] = _label_columns(labels, arrays, columns, path)
    elif "label" in columns:
        arrays["label"] = _label_column(columns["label"], arrays, path)
    return arrays


def _beginning_with(prefix: str, columns: Mapping[str, Sequence[Any]]) -> list[str]:
    return [name for name in columns if name == prefix or name.startswith(f"{prefix.rstrip('_')}_")]


def _class_names(named: Sequence[str]) -> tuple[str, ...] | None:
    """One score is of the second of two classes."""
    if len(named) == 1:
        return (f"not {named[0]}", named[0]) if named[0] else None
    return tuple(named)


def _label_columns(
    labels: Sequence[str],
    arrays: Mapping[str, np.ndarray],
    columns: Mapping[str, Sequence[Any]],
    path: Path,
) -> np.ndarray:
    """A label for each class, in the order of the scores."""
    expected = [f"label_{name}" for name in arrays.get("class_names", np.array([])).tolist()]
    if sorted(expected) != sorted(labels):
        message = (
            f"{path}: {', '.join(labels)} do not name the classes of the scores, expected "
            f"{', '.join(expected) or 'probability_<class> columns'}"
        )
        raise RecordError(message)
    return _numbers(expected, columns, path)


def _label_column(label: Sequence[Any], arrays: Mapping[str, np.ndarray], path: Path) -> np.ndarray:
    """Positions or names of classes."""
    names = arrays.get("class_names", np.array([])).tolist()
    words = [str(each) for each in label]
    if words and all(word in names for word in words):
        return np.array([names.index(word) for word in words])
    try:
        return np.array([float(word) for word in words])
    except ValueError as error:
        known = ", ".join(map(str, names)) or "0 and 1"
        message = f"{path}: label must be the position or the name of a class ({known}): {error}"
        raise RecordError(message) from error


def _numbers(names: Sequence[str], columns: Mapping[str, Sequence[Any]], path: Path) -> np.ndarray:
    """(N, K) of these columns."""
    try:
        values = [[float(value) for value in columns[name]] for name in names]
    except (TypeError, ValueError) as error:
        message = f"{path}: {', '.join(names)} must hold numbers in every row ({error})"
        raise RecordError(message) from error
    return np.array(values).T
