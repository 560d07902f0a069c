"""Single-stream latency of several candidates, timed in turns, and what disturbed it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medlite.bench.percentiles import least_samples, percentile_bound, round_interval
from medlite.bench.process import MeasuringProcess
from medlite.types import BenchmarkSettings, Measurement

MAX_WARMUP_BLOCKS = 10
LEVEL_RATIO = 0.95
"""warm: a block's median is no longer below this share of the block's before it"""
MAX_DRIFT_RATIO = 0.10
MAX_STEAL_RATIO = 0.02
MIN_STEAL_SECONDS = 0.03
"""three ticks of the kernel's clock: fewer say nothing"""
MAX_INVOLUNTARY_SWITCHES_PER_S = 50.0
MAX_INTERRUPTED_RATIO = 0.05
"""switches per query: fewer change no percentile that is reported"""
MAX_LOAD_PER_CORE = 1.25
MAX_TAIL_RATIO = 3.0


@dataclass(kw_only=True)
class Timing:
    """The raw samples of one candidate, and what went on while they were taken."""

    rounds_ms: list[list[float]] = field(default_factory=list)
    num_warmup: int = 0
    is_warm: bool = True
    """the latency was level when the warm-up ended"""
    wall_seconds: float = 0.0
    steal_seconds: float | None = None
    """time that a hypervisor gave to others, all cores together; None where it is not known"""
    involuntary_switches: float = 0
    load_average: float = 0.0
    """runnable processes over the minute before the first query"""

    @property
    def samples_ms(self) -> list[float]:
        """All samples in the order in which they were taken."""
        return [sample for block in self.rounds_ms for sample in block]

    @property
    def steal_ratio(self) -> float | None:
        """Share of the machine's time that others had."""
        if self.steal_seconds is None:
            return None
        return self.steal_seconds / (self.wall_seconds * (os.cpu_count() or 1))

    @property
    def switches_per_second(self) -> float:
        """How often a second the process had to give up its core."""
        return self.involuntary_switches / self.wall_seconds

    @property
    def drift_ratio(self) -> float:
        """Median of the second half of the rounds over that of the first, less one."""
        middle = len(self.rounds_ms) // 2
        first, second = (
            np.median(np.concatenate(half))
            for half in (self.rounds_ms[:middle], self.rounds_ms[middle:])
        )
        return float(second / first - 1)

    def add(self, answer: Mapping[str, Any]) -> None:
        """Take up one block as the worker reports it."""
        self.rounds_ms.append([sample / 1e6 for sample in answer["samples_ns"]])
        self.wall_seconds += answer["wall_seconds"]
        self.involuntary_switches += answer["involuntary_switches"]
        if "steal_seconds" in answer:
            self.steal_seconds = (self.steal_seconds or 0.0) + answer["steal_seconds"]


def warm_up(process: MeasuringProcess, settings: BenchmarkSettings) -> Timing:
    """Run blocks of `settings.num_warmup` queries until their median no longer falls."""
    timing = Timing(load_average=os.getloadavg()[0], is_warm=False)
    previous = float("inf")
    for _ in range(MAX_WARMUP_BLOCKS):
        answer = process.ask(
            "time", num_queries=settings.num_warmup, batch_size=settings.batch_size
        )
        timing.num_warmup += settings.num_warmup
        median = float(np.median(answer["samples_ns"]))
        if median >= LEVEL_RATIO * previous:
            timing.is_warm = True
            break
        previous = median
    return timing


def round_sizes(settings: BenchmarkSettings) -> list[int]:
    """How many queries each round has: `num_queries` in `num_rounds` nearly equal parts."""
    share, rest = divmod(settings.num_queries, settings.num_rounds)
    return [share + (index < rest) for index in range(settings.num_rounds)]


def find_disturbances(timing: Timing) -> str:
    """Say "stable", or "unstable: " and the reasons."""
    samples = np.asarray(timing.samples_ms)
    median, late = np.percentile(samples, [50, 90])
    per_core = timing.load_average / (os.cpu_count() or 1)
    checks = [
        (not timing.is_warm, f"still getting faster after {timing.num_warmup} warm-up queries"),
        (
            abs(timing.drift_ratio) > MAX_DRIFT_RATIO,
            f"second half {timing.drift_ratio:+.0%} against the first",
        ),
        (
            (timing.steal_ratio or 0) > MAX_STEAL_RATIO
            and (timing.steal_seconds or 0) >= MIN_STEAL_SECONDS,
            f"others took {timing.steal_ratio or 0:.0%} of the machine (steal)",
        ),
        (
            timing.switches_per_second > MAX_INVOLUNTARY_SWITCHES_PER_S
            and timing.involuntary_switches > MAX_INTERRUPTED_RATIO * len(samples),
            f"{timing.switches_per_second:.0f} involuntary context switches a second",
        ),
        (per_core > MAX_LOAD_PER_CORE, f"load average {timing.load_average:.1f} at the start"),
        (late > MAX_TAIL_RATIO * median, f"90th percentile {late / median:.1f} times the median"),
    ]
    reasons = [reason for is_so, reason in checks if is_so]
    return f"unstable: {'; '.join(reasons)}" if reasons else "stable"


def summarise(prefix: str, runtime: str, timing: Timing) -> list[Measurement]:
    """The latency and contention measurements of one candidate.

    Args:
        prefix: "" or "baseline/", before every name.
        runtime: the runtime's name, inside every name.
        timing: at least two rounds.
    """
    samples = timing.samples_ms
    note = f"{timing.num_warmup} warm-up queries; {find_disturbances(timing)}"
    base = f"{prefix}latency/{runtime}"

    def measure(
        name: str,
        value: float,
        unit: str,
        *,
        spread: tuple[float, float] | None = None,
        note: str = "",
    ) -> Measurement:
        return Measurement(
            name=name,
            value=value,
            unit=unit,
            n=len(samples),
            spread=spread,
            higher_is_better=False,
            note=note,
        )

    steal = f"{prefix}contention/{runtime}/steal_ratio"
    return [
        measure(
            f"{base}/p50_ms",
            float(np.median(samples)),
            "ms",
            spread=round_interval(_median, timing.rounds_ms),
            note=note,
        ),
        *(_percentile(f"{base}/p{round(p * 100)}_ms", p, samples, note) for p in (0.9, 0.99)),
        measure(
            f"{base}/mean_ms",
            float(np.mean(samples)),
            "ms",
            spread=round_interval(_mean, timing.rounds_ms),
            note=note,
        ),
        measure(f"{base}/sd_ms", float(np.std(samples, ddof=1)), "ms"),
        measure(f"{base}/drift_ratio", timing.drift_ratio, "ratio"),
        measure(
            f"{prefix}contention/{runtime}/involuntary_switches_per_s",
            timing.switches_per_second,
            "1/s",
        ),
        measure(f"{prefix}contention/{runtime}/load_average", timing.load_average, "processes"),
        Measurement.unavailable(steal, "ratio", "this system does not count stolen time")
        if timing.steal_ratio is None
        else measure(steal, timing.steal_ratio, "ratio"),
    ]


def compare(runtime: str, baseline: Timing, deployed: Timing) -> Measurement:
    """How many times faster `deployed` is: the ratio of the medians over paired rounds."""
    rounds = (baseline.rounds_ms, deployed.rounds_ms)
    return Measurement(
        name=f"speedup/{runtime}/ratio",
        value=_ratio_of_medians(baseline.samples_ms, deployed.samples_ms),
        unit="ratio",
        n=len(deployed.rounds_ms),
        spread=round_interval(_ratio_of_medians, *rounds),
        higher_is_better=True,
        note="p50 of the baseline over p50 of the deployed model, timed in turns",
    )


def _ratio_of_medians(baseline: Sequence[float], deployed: Sequence[float]) -> float:
    return float(np.median(baseline) / np.median(deployed))


def _median(samples: np.ndarray) -> float:
    return float(np.median(samples))


def _mean(samples: np.ndarray) -> float:
    return float(np.mean(samples))


def _percentile(name: str, percentile: float, samples: Sequence[float], note: str) -> Measurement:
    bound = percentile_bound(samples, percentile)
    if bound is None:
        reason = f"needs n >= {least_samples(percentile)} queries, got {len(samples)}"
        return Measurement.unavailable(name, "ms", reason)
    return Measurement(
        name=name,
        value=bound,
        unit="ms",
        n=len(samples),
        higher_is_better=False,
        note=f"not exceeded with 99 % confidence (MLPerf early stopping); {note}",
    )
