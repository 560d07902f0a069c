"""Stages `export` and `bench`: each kept in the run directory under the key of what it measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from torch import nn

from medlite.bench.benchmark import BenchmarkResult
from medlite.bench.callback import BenchmarkCallback
from medlite.config import digest
from medlite.export.export import export_all
from medlite.pipeline.job import Job
from medlite.pipeline.kept import read_kept, write_kept
from medlite.tasks.supervised import SupervisedTask
from medlite.types import Artifact, Measurement, Predictions

_log = logging.getLogger(__name__)

Artifacts = dict[str, dict[str, Artifact]]
"""candidate ("" deployed, "baseline") -> format -> artifact"""


def export_models(job: Job, nets: Mapping[str, nn.Module], key: str) -> Artifacts:
    """Every candidate in every format that a runtime of the job loads.

    The paths are kept relative to the run directory, which may be moved or named otherwise.
    """
    directory = job.config.directory
    path = directory / "artifacts.json"
    formats = sorted({runtime.format for runtime in job.runtimes.values()})
    key = digest([key, formats])
    kept = read_kept(path, key)
    found = None if kept is None else _find_artifacts(directory, kept)
    if found is not None:
        return found
    artifacts: Artifacts = {}
    for name, net in nets.items():
        _log.info("export: %s as %s", name or "the deployed model", ", ".join(formats))
        artifacts[name] = export_all(
            net,
            formats=formats,
            input_shape=job.spec.input_shape,
            directory=directory / "artifacts",
            stem=name or "model",
        )
    plain = {
        name: {
            form: artifact.moved(lambda file: file.relative_to(directory)).to_json()
            for form, artifact in by_format.items()
        }
        for name, by_format in artifacts.items()
    }
    write_kept(path, key, plain)
    return artifacts


def _find_artifacts(directory: Path, kept: Mapping[str, Any]) -> Artifacts | None:
    """What was exported before, if every file of it is still in the run directory."""
    relative = {
        name: {form: Artifact.from_json(plain) for form, plain in by_format.items()}
        for name, by_format in kept.items()
    }
    found = {
        name: {form: each.moved(directory.joinpath) for form, each in by_format.items()}
        for name, by_format in relative.items()
    }
    files = [
        file
        for by_format in found.values()
        for each in by_format.values()
        for file in (each.path, *each.files)
    ]
    is_whole = all(file.is_file() and file.is_relative_to(directory) for file in files)
    return found if is_whole else None


def measure(
    job: Job, nets: Mapping[str, nn.Module], artifacts: Artifacts, key: str
) -> BenchmarkResult:
    """Latency, memory, energy and the runtimes' own predictions on the test images."""
    directory = job.config.directory / "bench"
    settings = job.config.benchmark
    key = digest([key, asdict(settings), asdict(job.config.hardware), job.config.runtime])
    kept = read_kept(directory / "bench.json", key)
    if kept is not None:
        with np.load(directory / "predictions.npz") as arrays:
            predictions = {name: arrays[name] for name in arrays.files}
        measurements = [Measurement(**_tuple_spread(row)) for row in kept.pop("measurements")]
        return BenchmarkResult(**kept, measurements=measurements, predictions=predictions)
    callback = BenchmarkCallback(
        runtimes=list(job.runtimes.values()),
        hardware=job.config.hardware,
        settings=settings,
        artifacts=artifacts[""],
        baseline=artifacts.get("baseline"),
        directory=directory,
    )
    task = SupervisedTask(nets[""], spec=job.spec, settings=job.config.train)
    # One batch: the callback takes every image from the loader itself, in the runtimes.
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, limit_test_batches=1,
    )  # fmt: skip
    trainer.test(task, datamodule=job.data, verbose=False)
    result = callback.result
    assert result is not None
    logits: dict[str, Any] = dict(result.predictions)
    np.savez_compressed(directory / "predictions.npz", **logits)
    plain = asdict(result)
    del plain["predictions"]
    write_kept(directory / "bench.json", key, plain)
    return result


@torch.no_grad()
def predict(job: Job, net: nn.Module, split: Literal["val", "test"] = "test") -> Predictions:
    """What torch itself says about a split."""
    net.cpu()
    loaders = {"val": job.data.val_dataloader, "test": job.data.test_dataloader}
    batches = list(loaders[split]())
    logits = torch.cat([net(batch.image) for batch in batches])
    targets = torch.cat([batch.target for batch in batches])
    return Predictions(
        logits=logits.float().numpy(), targets=targets.numpy(), groups=job.data.groups(split)
    )


def split_key(key: str) -> tuple[str, str]:
    """Which net a candidate is of, and its runtime.

    >>> split_key("baseline/openvino"), split_key("openvino")
    (('baseline', 'openvino'), ('', 'openvino'))
    """
    name, _, runtime = key.rpartition("/")
    return name, runtime


def keep_targets(job: Job, reference: Predictions) -> None:
    """What was true, and of whom, beside what the runtimes said: for `medlite gate`.

    Group ids stay in the run directory, like splits.json.
    """
    path = job.config.directory / "bench" / "targets.npz"
    groups = np.array(reference.groups, dtype=np.str_)
    np.savez_compressed(path, targets=reference.targets, groups=groups)


def _tuple_spread(row: dict) -> dict:
    return {**row, "spread": None if row["spread"] is None else tuple(row["spread"])}
