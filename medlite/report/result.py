"""result.json: the truth of a run, from which everything else is made.

Nothing in it may identify a patient: no file names, no ids, groups by count only. Every field is
described in result.schema.json beside this file.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from medlite.errors import RecordError
from medlite.report.redact import redact_paths
from medlite.types import Measurement, Source

SCHEMA_VERSION = 1
FILE_NAME = "result.json"
SCHEMA_PATH = Path(__file__).with_name("result.schema.json")


@dataclass(frozen=True, kw_only=True)
class CardField:
    """One line of the deployment card."""

    label: str
    value: str
    provenance: Source
    note: str = ""
    """how it was measured, or why it is unavailable"""


@dataclass(frozen=True, kw_only=True)
class CardCategory:
    """One of the nine categories of the deployment card."""

    title: str
    fields: tuple[CardField, ...]


@dataclass(kw_only=True)
class RunResult:
    """One run.

    Dictionaries over candidates are keyed as the benchmark keys them: "onnxruntime" for the
    deployed model in that runtime, "baseline/onnxruntime" for the uncompressed one.
    """

    name: str
    created_at: str
    """ISO 8601, UTC"""
    choices: dict[str, str]
    """the option chosen in each group: dataset, model, compression, runtime, hardware ..."""
    primary_metric: str
    dataset: dict[str, Any]
    """`DataSpec` as plain values"""
    config: dict[str, Any]
    environment: dict[str, Any]
    measurements: list[Measurement]
    stages: list[dict[str, Any]]
    """name, seconds, key"""
    verdict: dict[str, Any]
    """budgets, safety, parity, quantization, gain, unmeasured (runtimes), summary"""
    artifacts: list[dict[str, Any]]
    """`Artifact.to_json` with paths relative to the run directory, and the candidate's key"""
    parity: list[dict[str, Any]] = field(default_factory=list)
    safety: dict[str, dict[str, Any]] = field(default_factory=dict)
    """runtime -> `SafetyReport.to_json`; empty where there was nothing to compare"""
    control: dict[str, dict[str, Any]] = field(default_factory=dict)
    """the same against the uncompressed model after as much further training, in float"""
    operating_points: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """"deployed" and "baseline" -> `OperatingPoint` of each class, empty lists in segmentation"""
    robustness: dict[str, dict[str, Any]] = field(default_factory=dict)
    """runtime -> `RobustnessReport.to_json`; empty where it was switched off"""
    shortcuts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """runtime -> `ShortcutReport.to_json`; empty where it was switched off"""
    explanations: dict[str, Any] = field(default_factory=dict)
    """how alike both models' saliency maps are: images, `Agreement` rows and the npz of pictures;
    empty where it was switched off"""
    exemplars: dict[str, dict[str, Any]] = field(default_factory=dict)
    """runtime -> the images on which both models agree least; empty without a baseline"""
    failure_modes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """runtime -> the worst cases by loss and by change, and groups of images"""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """what each stage left: size, cost, scores, time and the sha256 of its weights"""
    teacher: dict[str, Any] = field(default_factory=dict)
    """whom a step learned from: name, key, size, cost, scores, and the classes that it finds
    less often than the student's baseline; empty where its classes are not the run's"""
    learned_from: list[str] = field(default_factory=list)
    """sha256 of each file that a step learned from: checkpoints, and the records of runs"""
    card: list[CardCategory] = field(default_factory=list)
    history: dict[str, list[dict[str, float | None]]] = field(default_factory=dict)
    """fit name -> one dict an epoch"""
    latency_samples_ms: dict[str, list[float]] = field(default_factory=dict)
    reliability: dict[str, list[dict[str, float | int | None]]] = field(default_factory=dict)
    engines: dict[str, dict[str, str]] = field(default_factory=dict)
    operators: dict[str, dict[str, int]] = field(default_factory=dict)
    stability: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """candidate -> why it could not be measured"""
    notes: dict[str, str] = field(default_factory=dict)
    """topic -> text, from the compression steps"""
    examples: str | None = None
    """examples.npz in the run directory"""
    num_skipped: int = 0
    schema_version: int = SCHEMA_VERSION


def write_result(result: RunResult, run_directory: Path) -> Path:
    """Write result.json whole or not at all.

    Numbers that are not finite become null (measurements become unavailable): JSON has no NaN.
    Paths in the configuration's dataset section are left out.

    Returns:
        The path of the file.

    Raises:
        RecordError: the disk is full or the directory cannot be written to.
    """
    finite = [finite_measurement(measurement) for measurement in result.measurements]
    plain = asdict(replace(result, measurements=finite, config=redact_paths(result.config)))
    text = json.dumps(without_nan(plain), indent=1, allow_nan=False)
    path = run_directory / FILE_NAME
    write_atomically(path, text)
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see all of it or the file before.

    Raises:
        RecordError: the disk is full or the directory cannot be written to.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        message = (
            f"{path} could not be written: {error.strerror}; make room or choose another "
            "directory, and start the same command again: finished stages are kept"
        )
        raise RecordError(message) from error


def read_result(path: Path) -> RunResult:
    """Read result.json.

    Raises:
        RecordError: the file is missing, cut off, or of another version.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"{path} could not be read: {error.strerror}"
        raise RecordError(message) from error
    except ValueError as error:
        message = f"{path} is not whole JSON ({error}); run the same command again to rewrite it"
        raise RecordError(message) from error
    version = plain.get("schema_version") if isinstance(plain, dict) else None
    if version != SCHEMA_VERSION:
        message = (
            f"{path} has schema version {version}, expected {SCHEMA_VERSION}; read it with the "
            "medlite that wrote it, or run it again"
        )
        raise RecordError(message)
    return result_from_json(plain, path)


def result_from_json(plain: dict[str, Any], path: Path) -> RunResult:
    """Rebuild the typed parts; `path` is for the error message."""
    needed = {each.name for each in fields(RunResult) if each.default is MISSING}
    needed -= {each.name for each in fields(RunResult) if each.default_factory is not MISSING}
    unknown = plain.keys() - {each.name for each in fields(RunResult)}
    missing = needed - plain.keys()
    if missing or unknown:
        message = f"{path}: missing fields {sorted(missing)}, unknown fields {sorted(unknown)}"
        raise RecordError(message)
    try:
        plain["measurements"] = [measurement_from_json(row) for row in plain["measurements"]]
        plain["card"] = [category_from_json(row) for row in plain.get("card", [])]
    except (TypeError, KeyError, ValueError) as error:
        message = f"{path}: a measurement or card entry is malformed ({error})"
        raise RecordError(message) from error
    return RunResult(**plain)


def measurement_from_json(plain: Mapping[str, Any]) -> Measurement:
    """The inverse of `asdict`."""
    spread = plain.get("spread")
    return Measurement(**{**plain, "spread": None if spread is None else tuple(spread)})


def category_from_json(plain: Mapping[str, Any]) -> CardCategory:
    """The inverse of `asdict`."""
    rows = tuple(CardField(**row) for row in plain["fields"])
    return CardCategory(title=plain["title"], fields=rows)


def finite_measurement(measurement: Measurement) -> Measurement:
    """An infinite or undefined value is recorded as absent, with its reason."""
    if measurement.value is not None and not math.isfinite(measurement.value):
        reason = f"the value was {measurement.value}"
        return Measurement.unavailable(measurement.name, measurement.unit, reason)
    is_known = measurement.spread is None or all(map(math.isfinite, measurement.spread))
    return measurement if is_known else replace(measurement, spread=None)


def without_nan(value: Any) -> Any:
    """The same plain values with null for numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
