"""Part of stage `bench`: what every candidate tells from images whose finding is hidden."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from medlite.bench.benchmark import BenchmarkResult
from medlite.config import digest
from medlite.pipeline.job import Job
from medlite.pipeline.kept import read_kept, write_kept
from medlite.pipeline.robustness import spread_positions
from medlite.pipeline.sessions import answer_one_by_one, open_sessions
from medlite.safety.shortcuts import compare_shortcuts, hide, probes_of, shortcut_statistic
from medlite.types import Artifact, Predictions

if TYPE_CHECKING:
    from medlite.metrics.intervals import Statistic

_log = logging.getLogger(__name__)


def measure_shortcuts(
    job: Job, artifacts: Mapping[str, Mapping[str, Artifact]], bench: BenchmarkResult, key: str
) -> dict[str, dict[str, Any]]:
    """Runtime -> `ShortcutReport.to_json`, kept in the run directory; empty where switched off."""
    config = job.config
    if not config.shortcuts.enabled:
        return {}
    path = config.directory / "bench" / "shortcuts.json"
    made_of = [asdict(config.shortcuts), config.safety.num_resamples, asdict(config.hardware)]
    key = digest([key, config.runtime, config.seed, *made_of])
    kept = read_kept(path, key)
    if kept is not None:
        return kept
    positions = spread_positions(len(job.data.groups("test")), config.shortcuts.num_images)
    scores = _score(job, artifacts, bench, positions)
    reports = {
        runtime: compare_shortcuts(
            scores.get(f"baseline/{runtime}"),
            of_runtime,
            groups=[job.data.groups("test")[position] for position in positions],
            spec=job.spec,
            num_resamples=config.safety.num_resamples,
            seed=config.seed,
        ).to_json()
        for runtime, of_runtime in scores.items()
        if "/" not in runtime
    }
    write_kept(path, key, reports)
    return reports


def _score(
    job: Job,
    artifacts: Mapping[str, Mapping[str, Artifact]],
    bench: BenchmarkResult,
    positions: Sequence[int],
) -> dict[str, dict[str, Statistic]]:
    """Candidate -> probe -> its score; outputs for whole images are the benchmark's."""
    split = job.data.data.test
    images, targets = zip(*(split.samples[position] for position in positions), strict=True)
    groups = tuple(split.groups[position] for position in positions)
    probes = probes_of(job.spec, has_regions=split.regions is not None)
    _log.info("shortcuts: %d images, %s", len(images), ", ".join(probes))

    def statistic(logits: np.ndarray) -> Statistic:
        said = Predictions(logits=logits, targets=np.stack(targets), groups=groups)
        return shortcut_statistic(said, job.spec)

    scores = {
        candidate: {"clean": statistic(logits[list(positions)])}
        for candidate, logits in bench.predictions.items()
    }
    regions = _regions(job, positions, targets)
    with open_sessions(job, artifacts, bench.predictions) as sessions:
        for probe in probes:
            hidden = [
                hide(image, probe, region) for image, region in zip(images, regions, strict=True)
            ]
            for candidate, session in sessions.items():
                scores[candidate][probe] = statistic(answer_one_by_one(session, hidden))
    return scores


def _regions(
    job: Job, positions: Sequence[int], targets: Sequence[np.ndarray]
) -> list[np.ndarray | None]:
    """Where the finding of each image is, as far as it is known."""
    if job.spec.task == "segmentation":
        return [target > 0 for target in targets]
    known = job.data.data.test.regions
    return [None if known is None else known[position] for position in positions]
