"""Measure exported models side by side: latency, throughput, memory, size, energy, operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from medlite.bench import latency
from medlite.bench.lane import Candidate, Lane
from medlite.errors import BenchmarkError, ConfigError
from medlite.types import BenchmarkSettings, Hardware, Measurement

NOT_ON_TARGET = "measured on this host, not on the target"

_STAGES = (
    Lane.summarise_latency,
    Lane.measure_memory,
    Lane.predict,
    Lane.measure_throughput,
    Lane.measure_energy,
    Lane.count_operators,
)
"""What follows the timing; memory comes before all that needs more than single queries."""


@dataclass(kw_only=True)
class BenchmarkResult:
    """All that was measured; the dictionaries are keyed by `Candidate.key`."""

    measurements: list[Measurement] = field(default_factory=list)
    samples_ms: dict[str, list[float]] = field(default_factory=dict)
    """latency of each query, in the order in which they were timed"""
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    """logits of every image, (N, K) or (N, K, H, W[, D])"""
    stability: dict[str, str] = field(default_factory=dict)
    """"stable", or "unstable: " and the reasons"""
    operators: dict[str, dict[str, int]] = field(default_factory=dict)
    """of the optimised graph; those that compute in 8 bits begin with "int8:" """
    engines: dict[str, dict[str, str]] = field(default_factory=dict)
    """engine, version and backend configuration"""
    failures: dict[str, str] = field(default_factory=dict)
    """why a candidate could not be measured; what it had ended before is in the others"""


def benchmark(
    candidates: Sequence[Candidate],
    *,
    hardware: Hardware,
    settings: BenchmarkSettings,
    images: np.ndarray,
    directory: Path,
) -> BenchmarkResult:
    """Measure all candidates, each in a fresh process, their queries in turns (A B A B ...).

    A candidate that cannot run here leaves its measurements "unavailable", with the reason, and
    the others go on.

    Args:
        candidates: each (name, runtime) once.
        hardware: threads, cores and memory of the processes.
        settings: how often and how long.
        images: (N, C, H, W[, D]) float32, real ones; every candidate predicts all of them.
        directory: for job files and the standard error of the processes.

    Raises:
        ConfigError: settings that cannot be measured with.
        BenchmarkError: none of the candidates could be measured.
    """
    _check(candidates, settings, num_images=len(images))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "images.npy"
    np.save(path, np.ascontiguousarray(images, dtype=np.float32))
    runtime_only_kib: dict[str, int] = {}
    lanes = [
        Lane(
            each,
            hardware=hardware,
            settings=settings,
            images=path,
            directory=directory,
            runtime_only_kib=runtime_only_kib,
        )
        for each in candidates
    ]
    try:
        _measure(lanes, settings)
    finally:
        for lane in lanes:
            lane.close()
        path.unlink()
    result = _gather(lanes)
    if not hardware.is_this_machine:
        result.measurements = [_label_as_host(each) for each in result.measurements]
    return result


def _measure(lanes: Sequence[Lane], settings: BenchmarkSettings) -> None:
    for preparation in (Lane.start, Lane.warm_up):
        for lane in lanes:
            lane.attempt(preparation)
    for num_queries in latency.round_sizes(settings):
        for lane in lanes:
            lane.attempt(Lane.time_round, num_queries)
    for stage in _STAGES:
        for lane in lanes:
            lane.attempt(stage)


def _gather(lanes: Sequence[Lane]) -> BenchmarkResult:
    result = BenchmarkResult()
    for lane in lanes:
        key = lane.candidate.key
        result.measurements += lane.measurements
        if lane.failure is not None:
            result.failures[key] = lane.failure
        if lane.is_timed:
            result.samples_ms[key] = lane.timing.samples_ms
            result.stability[key] = latency.find_disturbances(lane.timing)
        if lane.logits is not None:
            result.predictions[key] = lane.logits
        if lane.operators:
            result.operators[key] = lane.operators
        if lane.description:
            result.engines[key] = lane.description
    if len(result.failures) == len(lanes):
        reasons = "\n".join(f"  {key}: {reason}" for key, reason in result.failures.items())
        message = f"none of the candidates could be measured:\n{reasons}"
        raise BenchmarkError(message)
    result.measurements += _speedups(lanes)
    return result


def _speedups(lanes: Sequence[Lane]) -> Iterator[Measurement]:
    deployed = {lane.candidate.runtime.name: lane for lane in lanes if not lane.candidate.name}
    for lane in lanes:
        runtime = lane.candidate.runtime.name
        if lane.candidate.name != "baseline" or runtime not in deployed:
            continue
        untimed = [each.failure for each in (lane, deployed[runtime]) if not each.is_timed]
        if untimed:
            reason = untimed[0] or "not timed"
            yield Measurement.unavailable(f"speedup/{runtime}/ratio", "ratio", reason)
        else:
            yield latency.compare(runtime, lane.timing, deployed[runtime].timing)


def _label_as_host(measurement: Measurement) -> Measurement:
    note = f"{measurement.note}; {NOT_ON_TARGET}" if measurement.note else NOT_ON_TARGET
    return replace(measurement, note=note) if measurement.source == "measured" else measurement


def settings_problems(settings: BenchmarkSettings) -> list[str]:
    """What of the settings measures nothing; asked before anything is trained, too."""
    checks = {
        f"benchmark.num_warmup: {settings.num_warmup} is not at least 1": settings.num_warmup < 1,
        f"benchmark.num_rounds: {settings.num_rounds} is not at least 2": settings.num_rounds < 2,
        f"benchmark.num_queries: {settings.num_queries} is less than one for each of "
        f"{settings.num_rounds} rounds": settings.num_queries < settings.num_rounds,
        f"benchmark.batch_size: {settings.batch_size} is not at least 1": settings.batch_size < 1,
        f"benchmark.throughput_batch_size: {settings.throughput_batch_size} is not at least "
        "1": settings.throughput_batch_size < 1,
    }
    return [problem for problem, is_there in checks.items() if is_there]


def _check(
    candidates: Sequence[Candidate], settings: BenchmarkSettings, *, num_images: int
) -> None:
    keys = [candidate.key for candidate in candidates]
    checks = {
        f"runtime: {', '.join(keys)} must differ; give one a name of its own": len(keys)
        != len(set(keys)),
        "runtime: there is nothing to measure": not keys,
        "images: there is none to measure with": num_images == 0,
    }
    problems = settings_problems(settings)
    problems += [problem for problem, is_there in checks.items() if is_there]
    if problems:
        raise ConfigError(problems)
