"""A side of the comparison from a file of predictions; docs/gate.md describes the formats."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from medlite.errors import RecordError
from medlite.gate.sides import Side
from medlite.gate.tables import columns_to_arrays
from medlite.optional import require
from medlite.types import DataSpec, Labels, Predictions

FORMATS = (".npz", ".parquet", ".csv")
SMALLEST = 1e-12
"""probabilities closer to 0 or 1 than this count as this far away"""
SUM_TOLERANCE = 1e-3


def load_file(path: Path) -> Side:
    """Read one file.

    Raises:
        RecordError: it is not of a known format, or does not hold what the format asks for.
        MissingDependency: parquet without pyarrow.
    """
    if path.suffix not in FORMATS:
        message = f"{path}: expected a run directory or a file of {', '.join(FORMATS)}"
        raise RecordError(message)
    if not path.is_file():
        message = f"{path}: no such file or directory"
        raise RecordError(message)
    arrays = _read_npz(path) if path.suffix == ".npz" else columns_to_arrays(_columns(path), path)
    return side_of(arrays, path)


def side_of(arrays: dict[str, np.ndarray], path: Path) -> Side:
    """From the arrays `id`, `label`, `probabilities` or `logits`, and what may stand beside them.

    Raises:
        RecordError: an array is missing, or does not fit the others.
    """
    scores = _scores(arrays, path)
    ids = tuple(map(str, arrays["id"].tolist()))
    labels, is_segmentation = _kind(arrays["label"], scores)
    _check_shapes(arrays, scores, path, labels=labels)
    is_probability = "logits" not in arrays
    logits = _to_logits(scores, labels, path) if is_probability else scores.astype(np.float32)
    names = _class_names(
        arrays, logits.shape[1], path, labels=labels, is_segmentation=is_segmentation
    )
    has_patients = "patient" in arrays
    groups = tuple(map(str, arrays["patient"].tolist())) if has_patients else ids
    spec = DataSpec(
        name=path.stem,
        task="segmentation" if is_segmentation else "classification",
        labels=labels,
        in_channels=1,
        num_classes=logits.shape[1],
        image_size=arrays["label"].shape[1:] if is_segmentation else (),
        class_names=names,
        class_counts=(),
        num_samples={"test": len(ids)},
        num_groups={"test": len(set(groups))},
        group_kind="patient" if has_patients else "image",
        modality="unknown",
        provenance="predictions from a file",
        origin=path.name,
        preprocessing="unknown",
        spacing_mm=tuple(arrays["spacing_mm"].tolist()) if "spacing_mm" in arrays else None,
    )
    kind = np.float32 if labels == "multilabel" else np.int64
    targets = _targets(arrays["label"], path, len(names)).astype(kind)
    predictions = Predictions(logits=logits, targets=targets, groups=groups)
    return Side(name=str(path), ids=ids, predictions=predictions, spec=spec)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError) as error:
        message = f"{path} cannot be read as npz of plain arrays ({error})"
        raise RecordError(message) from error


def _columns(path: Path) -> dict[str, list[Any]]:
    if path.suffix == ".parquet":
        parquet = require("pyarrow.parquet", extra="parquet", needed_by=str(path))
        return parquet.read_table(path).to_pydict()
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return {name: [row[name] for row in rows] for name in reader.fieldnames or ()}


def _scores(arrays: dict[str, np.ndarray], path: Path) -> np.ndarray:
    missing = [name for name in ("id", "label") if name not in arrays]
    given = [name for name in ("logits", "probabilities") if name in arrays]
    if missing or len(given) != 1:
        message = (
            f"{path}: expected 'id', 'label', and either 'logits' or 'probabilities'; "
            f"found {', '.join(sorted(arrays)) or 'nothing'}"
        )
        raise RecordError(message)
    scores = arrays[given[0]]
    return scores[:, None] if scores.ndim == arrays["label"].ndim == 1 else scores


def _kind(label: np.ndarray, scores: np.ndarray) -> tuple[Labels, bool]:
    """One score is binary, a label for each score multi-label, anything else multi-class."""
    is_segmentation = label.ndim > 2
    if scores.ndim > 1 and scores.shape[1] == 1:
        return "binary", is_segmentation
    return ("multilabel" if label.ndim == 2 else "multiclass"), is_segmentation


def _check_shapes(
    arrays: dict[str, np.ndarray], scores: np.ndarray, path: Path, *, labels: Labels
) -> None:
    label, num_samples = arrays["label"], len(arrays["id"])
    expected = label.shape if labels == "multilabel" else (label.shape[0], *label.shape[1:])
    got = scores.shape if labels == "multilabel" else (scores.shape[0], *scores.shape[2:])
    lengths = {name: len(arrays[name]) for name in ("patient",) if name in arrays}
    is_whole = len(label) == num_samples and set(lengths.values()) <= {num_samples}
    if expected != got or not is_whole or not num_samples:
        message = (
            f"{path}: shapes do not go together: {num_samples} ids, labels {label.shape}, "
            f"scores {scores.shape}"
            + "".join(f", {count} of {name}" for name, count in lengths.items())
        )
        raise RecordError(message)


def _targets(label: np.ndarray, path: Path, num_classes: int) -> np.ndarray:
    upper = 2 if label.ndim == 2 else num_classes
    is_number = np.issubdtype(label.dtype, np.number) or label.dtype == bool
    if not is_number or not np.isin(label, np.arange(upper)).all():
        message = f"{path}: labels must be whole numbers from 0 to {upper - 1}"
        raise RecordError(message)
    return label


def _to_logits(probability: np.ndarray, labels: Labels, path: Path) -> np.ndarray:
    """Logits with these probabilities."""
    if (probability < 0).any() or (probability > 1).any():
        message = f"{path}: probabilities lie outside [0, 1]; give logits as 'logits'"
        raise RecordError(message)
    clipped = np.clip(probability.astype(np.float64), SMALLEST, 1 - SMALLEST)
    if labels != "multiclass":
        return (np.log(clipped) - np.log1p(-clipped)).astype(np.float32)
    if (np.abs(probability.sum(1) - 1) > SUM_TOLERANCE).any():
        message = (
            f"{path}: the probabilities of a sample must add up to 1; where several classes may "
            "be true at once, give a label for each class"
        )
        raise RecordError(message)
    return np.log(clipped).astype(np.float32)


def _class_names(
    arrays: dict[str, np.ndarray],
    num_logits: int,
    path: Path,
    *,
    labels: Labels,
    is_segmentation: bool,
) -> tuple[str, ...]:
    if "class_names" in arrays:
        names = tuple(map(str, arrays["class_names"].tolist()))
        num_names = 2 if labels == "binary" else num_logits
        if len(names) != num_names or len(set(names)) != num_names:
            message = (
                f"{path}: class_names: {', '.join(names)}; expected {num_names} different ones, "
                f"for {num_logits} score{'s' * (num_logits != 1)} a sample"
            )
            raise RecordError(message)
        return names
    if labels == "binary":
        return ("background", "foreground") if is_segmentation else ("negative", "positive")
    return tuple(f"class {position}" for position in range(num_logits))
