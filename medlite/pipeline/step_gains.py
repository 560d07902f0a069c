"""What each step of a recipe brings on the job's runtimes, beside the net that came into it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from medlite.bench.benchmark import benchmark
from medlite.bench.lane import Candidate
from medlite.config import digest
from medlite.errors import MedliteError
from medlite.export.export import export_all
from medlite.pipeline.job import Job
from medlite.pipeline.kept import read_kept, write_kept
from medlite.pipeline.measuring import Artifacts
from medlite.pipeline.training import Trained
from medlite.report.gains import Gains, gains_of
from medlite.types import Artifact, Measurement

_log = logging.getLogger(__name__)

NUM_QUERIES = 100
"""of each net, at most: the whole recipe is measured with more"""


def measure_steps(
    job: Job,
    steps: Mapping[str, Trained],
    artifacts: Artifacts,
    measurements: Sequence[Measurement],
) -> dict[str, Gains]:
    """The gains of each step: its net and the one before it, their queries in turns.

    A recipe of one step has been measured already.

    Args:
        job: whose runtimes and hardware count.
        steps: what each step left.
        artifacts: of the uncompressed and of the deployed net.
        measurements: of both.

    Returns:
        step -> runtime -> gain; empty where `benchmark.each_step` is off for several steps.
    """
    if len(steps) == 1:
        return {name: gains_of(measurements, job.runtimes) for name in steps}
    if not steps or not job.config.benchmark.each_step:
        return {}
    path = job.config.directory / "bench" / "steps.json"
    config = job.config
    keys = [trained.key for trained in steps.values()]
    key = digest([keys, asdict(config.benchmark), asdict(config.hardware), config.runtime])
    kept = read_kept(path, key)
    if kept is not None:
        return kept
    with TemporaryDirectory(dir=path.parent) as scratch:
        exported = _exported(job, steps, artifacts, Path(scratch))
        found = {
            after: _gains(job, exported[before], exported[after], Path(scratch))
            for before, after in pairwise(exported)
        }
    if all(gain["speedup"] is not None for gains in found.values() for gain in gains.values()):
        write_kept(path, key, found)
    return found


def _exported(
    job: Job, steps: Mapping[str, Trained], artifacts: Artifacts, directory: Path
) -> dict[str, dict[str, Artifact] | str]:
    """By the names of what left them, the uncompressed net first; or why there is none."""
    exported: dict[str, dict[str, Artifact] | str] = {"": artifacts["baseline"]}
    *between, last = steps
    for name in between:
        _log.info("export: what %s left, to be timed", name)
        try:
            exported[name] = export_all(
                steps[name].net,
                formats=list(artifacts[""]),
                input_shape=job.spec.input_shape,
                directory=directory,
                stem=name,
            )
        except MedliteError as error:
            exported[name] = str(error)
    return {**exported, last: artifacts[""]}


def _gains(
    job: Job, before: dict[str, Artifact] | str, after: dict[str, Artifact] | str, directory: Path
) -> Gains:
    names = list(job.runtimes)
    if isinstance(before, str) or isinstance(after, str):
        return gains_of([], names, reason=before if isinstance(before, str) else str(after))
    settings = job.config.benchmark
    try:
        result = benchmark(
            [
                Candidate(artifact=of_net[runtime.format], runtime=runtime, name=name)
                for runtime in job.runtimes.values()
                for name, of_net in (("baseline", before), ("", after))
            ],
            hardware=job.config.hardware,
            settings=replace(
                settings,
                num_queries=max(settings.num_rounds, min(settings.num_queries, NUM_QUERIES)),
                throughput_seconds=0.0,
                energy_seconds=0.0,
            ),
            images=job.data.calibration_images(1).numpy(),
            directory=directory,
        )
    except MedliteError as error:
        return gains_of([], names, reason=str(error))
    return gains_of(result.measurements, names)
