"""One candidate on its way through the stages of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medlite.bench import energy, latency, memory, throughput
from medlite.bench.job import Job
from medlite.bench.process import MeasuringProcess
from medlite.errors import BenchmarkError
from medlite.types import Artifact, BenchmarkSettings, Hardware, Measurement, Runtime

PREDICTED_AT_ONCE = 100
"""images between two answers of the process, so that a time-out is one of a few images"""

_LEFT_OPEN = {
    "latency/{}/p50_ms": "ms",
    "latency/{}/p90_ms": "ms",
    "latency/{}/p99_ms": "ms",
    "latency/{}/mean_ms": "ms",
    "throughput/{}/images_per_s": "images/s",
    "memory/{}/peak_mib": "MiB",
    "memory/{}/runtime_only_mib": "MiB",
    "memory/{}/model_mib": "MiB",
    "energy/{}/net_mj_per_image": "mJ",
    "operators/{}/int8_count": "operators",
}
"""The measurements of a candidate that cannot run, and their units."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One exported model in one runtime.

    `name` is "" for the deployed model and "baseline" for what it is compared with.
    """

    artifact: Artifact
    runtime: Runtime
    name: str = ""

    @property
    def prefix(self) -> str:
        """What stands before the names of its measurements: "" or "baseline/"."""
        return f"{self.name}/" if self.name else ""

    @property
    def key(self) -> str:
        """The runtime's name after the prefix."""
        return f"{self.prefix}{self.runtime.name}"


class Lane:
    """A candidate, its process and what is known of it so far.

    Every stage is a method that adds to `measurements`; `attempt` runs one and
    takes the candidate out of the race where its process fails.

    Args:
        candidate: what is measured.
        hardware: threads, cores and memory of its process.
        settings: how often and how long.
        images: a .npy file, (N, C, H, W[, D]) float32.
        directory: for job files, predictions and the standard error.
        runtime_only_kib: peaks without a model, by runtime; shared by the lanes of a benchmark.
    """

    def __init__(
        self,
        candidate: Candidate,
        *,
        hardware: Hardware,
        settings: BenchmarkSettings,
        images: Path,
        directory: Path,
        runtime_only_kib: dict[str, int],
    ) -> None:
        self.candidate = candidate
        self.measurements = [_measure_size(candidate)]
        self.timing = latency.Timing()
        self.description: dict[str, str] = {}
        self.operators: dict[str, int] = {}
        self.logits: np.ndarray | None = None
        self.failure: str | None = None
        self.is_timed = False
        self._names = (candidate.prefix, candidate.runtime.name)
        self._hardware = hardware
        self._settings = settings
        self._images = images
        self._directory = directory
        self._runtime_only_kib = runtime_only_kib
        self._process: MeasuringProcess | None = None

    def attempt(self, stage: Callable[..., None], *arguments: Any) -> None:
        """Run `stage`, one of the methods below; after a failure nothing more is run."""
        if self.failure is not None:
            return
        try:
            stage(self, *arguments)
        except BenchmarkError as error:
            self.failure = str(error)
            self._leave_open(self.failure)
            self.close()

    def start(self) -> None:
        """Start the process and let it load the model."""
        self._process = self._open(self.candidate.artifact, self.candidate.key)
        self.description = self._ask("describe")["description"]

    def warm_up(self) -> None:
        """Query until the latency is level."""
        assert self._process is not None
        self.timing = latency.warm_up(self._process, self._settings)

    def time_round(self, num_queries: int) -> None:
        """Add one round of timed queries."""
        batch_size = self._settings.batch_size
        self.timing.add(self._ask("time", num_queries=num_queries, batch_size=batch_size))

    def summarise_latency(self) -> None:
        """Percentiles, mean and what disturbed them."""
        self.measurements += latency.summarise(*self._names, self.timing)
        self.is_timed = True

    def measure_memory(self) -> None:
        """The peak so far, beside that of a process without a model."""
        peak_kib = self._ask("memory")["peak_kib"]
        runtime = self.candidate.runtime.name
        if runtime not in self._runtime_only_kib:
            with self._open(None, f"{runtime}-without-model") as empty:
                self._runtime_only_kib[runtime] = empty.ask("memory")["peak_kib"]
        self.measurements += memory.summarise(
            *self._names, peak_kib, self._runtime_only_kib[runtime]
        )

    def predict(self) -> None:
        """The logits of every image, one image at a time."""
        path = self._directory / f"{self.candidate.key.replace('/', '-')}.logits.npy"
        start, num_images = 0, 1
        while start < num_images:
            answer = self._ask("predict", path=str(path), start=start, size=PREDICTED_AT_ONCE)
            start, num_images = answer["stop"], answer["num_images"]
        self.logits = np.load(path)
        path.unlink()

    def measure_throughput(self) -> None:
        """Batch after batch for `settings.throughput_seconds`."""
        size = self._settings.throughput_batch_size
        answer = self._ask("run_for", seconds=self._settings.throughput_seconds, batch_size=size)
        seconds = [nanoseconds / 1e9 for nanoseconds in answer["samples_ns"]]
        self.measurements.append(throughput.summarise(*self._names, seconds, size))

    def measure_energy(self) -> None:
        """Joules per image at the batch size of the latency, where the machine counts them."""
        if self._settings.energy_seconds <= 0:
            reason = "switched off (benchmark.energy_seconds=0)"
            self.measurements += energy.unavailable(*self._names, reason)
            return
        try:
            source = energy.find_energy_source(self._hardware.device)
        except energy.NO_SOURCE as error:
            self.measurements += energy.unavailable(*self._names, str(error))
            return
        seconds = energy.window_seconds(source, self._settings.energy_seconds)
        reading = energy.read_energy(source, self._run_single_stream, seconds)
        self.measurements += energy.summarise(*self._names, source, reading)

    def count_operators(self) -> None:
        """The operators of the optimised graph, and how many compute in 8 bits."""
        self.operators = self._ask("operators")["operators"]
        prefix, runtime = self._names
        count = sum(n for operator, n in self.operators.items() if operator.startswith("int8:"))
        self.measurements.append(
            Measurement(
                name=f"{prefix}operators/{runtime}/int8_count",
                value=count,
                unit="operators",
                n=1,
                note=f"of {sum(self.operators.values())} in the graph as the runtime optimised it",
            )
        )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process is not None
        return self._process.ask(command, **arguments)

    def _open(self, artifact: Artifact | None, name: str) -> MeasuringProcess:
        job = Job(
            runtime=self.candidate.runtime,
            artifact=artifact,
            hardware=self._hardware,
            images=self._images,
        )
        timeout_seconds = self._settings.timeout_seconds
        return MeasuringProcess(
            job, directory=self._directory, name=name, timeout_seconds=timeout_seconds
        )

    def _run_single_stream(self, seconds: float) -> int:
        batch_size = self._settings.batch_size
        answer = self._ask("run_for", seconds=seconds, batch_size=batch_size)
        return (len(answer["samples_ns"]) + 1) * batch_size  # it begins with an untimed one

    def _leave_open(self, reason: str) -> None:
        prefix, runtime = self._names
        done = {measurement.name for measurement in self.measurements}
        names = {f"{prefix}{name.format(runtime)}": unit for name, unit in _LEFT_OPEN.items()}
        self.measurements += [
            Measurement.unavailable(name, unit, reason)
            for name, unit in names.items()
            if name not in done
        ]


def _measure_size(candidate: Candidate) -> Measurement:
    return Measurement(
        name=f"{candidate.prefix}size/{candidate.runtime.name}/disk_kib",
        value=candidate.artifact.num_bytes / 1024,
        unit="KiB",
        n=1,
        higher_is_better=False,
        note=", ".join(file.suffix for file in candidate.artifact.files) + " files, engine aside",
    )
