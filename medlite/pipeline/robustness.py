"""Part of stage `bench`: every candidate on corrupted test images, in its own runtime."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from medlite.bench.benchmark import BenchmarkResult
from medlite.config import digest
from medlite.pipeline.job import Job
from medlite.pipeline.kept import read_kept, write_kept
from medlite.pipeline.sessions import answer_one_by_one, open_sessions
from medlite.safety.corruptions import corrupt
from medlite.safety.robustness import (
    CLEAN,
    Condition,
    compare_robustness,
    conditions_of,
    groups_behind,
    task_statistic,
)
from medlite.types import Artifact, Predictions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medlite.metrics.intervals import Statistic

_log = logging.getLogger(__name__)

NUM_RANGE_IMAGES = 64
"""training images that tell which values the preprocessing gives"""


def measure_robustness(
    job: Job, artifacts: Mapping[str, Mapping[str, Artifact]], bench: BenchmarkResult, key: str
) -> dict[str, dict[str, Any]]:
    """Runtime -> `RobustnessReport.to_json`, kept in the run directory; empty where switched off.

    Models run in this process, one image at a time as they are deployed; nothing is timed. Clean
    images are not run again: their outputs are the benchmark's.
    """
    config = job.config
    if not config.robustness.enabled:
        return {}
    path = config.directory / "bench" / "robustness.json"
    made_of = [asdict(config.robustness), asdict(config.safety), asdict(config.hardware)]
    key = digest([key, config.runtime, config.seed, *made_of])
    kept = read_kept(path, key)
    if kept is not None:
        return kept
    positions = spread_positions(len(job.data.groups("test")), config.robustness.num_images)
    scores = _score(job, artifacts, bench, positions)
    groups = [job.data.groups("test")[position] for position in positions]
    targets = np.stack([job.data.data.test.samples[position][1] for position in positions])
    logits = next(iter(bench.predictions.values()))[positions]
    behind = groups_behind(
        Predictions(logits=logits, targets=targets, groups=tuple(groups)), job.spec
    )
    reports = {
        runtime: compare_robustness(
            scores.get(f"baseline/{runtime}"),
            of_runtime,
            groups=groups,
            spec=job.spec,
            margins=config.safety,
            num_groups_behind=behind,
            seed=config.seed,
        ).to_json()
        for runtime, of_runtime in scores.items()
        if "/" not in runtime
    }
    write_kept(path, key, reports)
    return reports


def spread_positions(num_samples: int, num_images: int) -> list[int]:
    """Positions spread evenly over a split; all where it has fewer.

    >>> spread_positions(10, 4)
    [0, 2, 5, 7]
    """
    count = min(num_samples, num_images)
    return np.linspace(0, num_samples, count, endpoint=False).astype(int).tolist()


def _score(
    job: Job,
    artifacts: Mapping[str, Mapping[str, Artifact]],
    bench: BenchmarkResult,
    positions: Sequence[int],
) -> dict[str, dict[Condition, Statistic]]:
    """Candidate -> condition -> its task metric; the images of a condition are made once."""
    samples = [job.data.data.test.samples[position] for position in positions]
    groups = tuple(job.data.groups("test")[position] for position in positions)
    images = job.data.calibration_images(NUM_RANGE_IMAGES)
    value_range = (float(images.min()), float(images.max()))
    conditions = conditions_of(job.config.robustness, job.spec.modality)
    _log.info("robustness: %d images under %d corruptions", len(samples), len(conditions))

    def statistic(logits: np.ndarray, targets: Sequence[np.ndarray]) -> Statistic:
        said = Predictions(logits=logits, targets=np.stack(targets), groups=groups)
        return task_statistic(said, job.spec)

    clean_targets = [target for _, target in samples]
    scores = {
        key: {CLEAN: statistic(logits[list(positions)], clean_targets)}
        for key, logits in bench.predictions.items()
    }
    with open_sessions(job, artifacts, bench.predictions) as sessions:
        for name, severity in conditions:
            corrupted = [
                corrupt(
                    image,
                    target,
                    name=name,
                    severity=severity,
                    position=position,
                    value_range=value_range,
                )
                for position, (image, target) in zip(positions, samples, strict=True)
            ]
            targets = [target for _, target in corrupted]
            for key, session in sessions.items():
                logits = answer_one_by_one(session, (image for image, _ in corrupted))
                scores[key][name, severity] = statistic(logits, targets)
    return scores
