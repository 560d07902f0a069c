"""A side of the comparison from a run directory: what its runtime said on the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medlite.errors import RecordError, did_you_mean
from medlite.gate.sides import Side
from medlite.report.result import FILE_NAME, read_result
from medlite.safety.operating_point import OperatingPoint
from medlite.types import DataSpec, Predictions

LISTS = ("image_size", "class_names", "class_counts", "spacing_mm")


def candidates_of(directory: Path) -> list[str]:
    """What the run measured: "onnxruntime", "baseline/onnxruntime" ...; deployed models first.

    Raises:
        RecordError: the directory holds no predictions.
    """
    with _open(directory, "predictions.npz") as arrays:
        return sorted(arrays.files, key=lambda name: "/" in name)


def load_run(directory: Path, candidate: str) -> Side:
    """One candidate of a run; samples are known by their position in the test split.

    Raises:
        RecordError: something of the record is missing, or there is no such candidate.
    """
    known = candidates_of(directory)
    if candidate not in known:
        message = f"{directory}@{candidate}: no such candidate, {did_you_mean(candidate, known)}"
        raise RecordError(message)
    with _open(directory, "predictions.npz") as arrays:
        logits = arrays[candidate]
    with _open(directory, "targets.npz") as arrays:
        targets, groups = arrays["targets"], tuple(arrays["groups"].tolist())
    result = read_result(directory / FILE_NAME)
    name = "baseline" if "/" in candidate else "deployed"
    points = result.operating_points.get(name, [])
    return Side(
        name=f"{directory}@{candidate}",
        ids=tuple(map(str, range(len(logits)))),
        predictions=Predictions(logits=logits, targets=targets, groups=groups),
        spec=_spec_of(result.dataset),
        operating_points=tuple(OperatingPoint(**point) for point in points),
    )


def _spec_of(plain: dict[str, Any]) -> DataSpec:
    lists = {name: tuple(plain[name]) for name in LISTS if plain[name] is not None}
    return DataSpec(**{**plain, **lists})


def _open(directory: Path, name: str) -> Any:
    path = directory / "bench" / name
    if not path.exists():
        message = (
            f"{directory} has no bench/{name}: start its command again without stages=..., "
            "then the run keeps what its models said"
        )
        raise RecordError(message)
    return np.load(path)
