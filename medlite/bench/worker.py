"""The measuring process: `python -m medlite.bench.worker JOB.json`, told by its parent what to do.

One line of JSON comes in on standard input, one goes out on standard output. Threads, cores and
memory are limited before the engine is imported. Nothing is imported that the engine does not
bring, apart from numpy.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlite.bench.affinity import affinity_problem
from medlite.errors import BenchmarkError, MedliteError
from medlite.types import Hardware

if TYPE_CHECKING:
    import numpy as np

    from medlite.bench.job import Job
    from medlite.types import InferenceSession

NUM_REWARM_QUERIES = 2
"""untimed queries at the start of each block: the other candidate has emptied the caches"""
LOADED_AHEAD_BYTES = 4 * 2**20
"""images that are read before they are timed: reading one between two queries would take the
weights out of the caches, reading all would count as memory of the model"""
MIN_BATCHES = 3


def main() -> None:
    """Answer commands until standard input ends or says "exit"."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # engines print: what they print must not be taken for a reply

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    try:
        measured = _open(Path(sys.argv[1]))
    except MedliteError as error:
        reply(unavailable=str(error))
        return
    reply(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        if command == "exit":
            return
        reply(**_COMMANDS[command](measured, **request))


class Measured:
    """A loaded model, its images and the next one in turn."""

    def __init__(self, job: Job) -> None:
        from medlite.bench.images import ImageFile

        self.job = job
        self.images = ImageFile(job.images)
        self.description = job.runtime.describe(job.hardware)
        self.session: InferenceSession | None = None
        if job.artifact is not None:
            self.session = job.runtime.load(job.artifact, job.hardware)
        self._position = 0

    def load_ahead(self, max_batches: int, batch_size: int) -> list[np.ndarray]:
        """The next batches in turn: as many as `LOADED_AHEAD_BYTES` hold, at least one."""
        num_bytes = batch_size * self.images.num_bytes_each
        count = max(1, min(max_batches, LOADED_AHEAD_BYTES // num_bytes))
        batches = []
        for _ in range(count):
            batches.append(self.images.batch(self._position, batch_size))
            self._position = (self._position + batch_size) % len(self.images)
        return batches

    def run(self, batch: np.ndarray) -> int:
        """Run one batch; the nanoseconds that it took."""
        assert self.session is not None
        start = time.perf_counter_ns()
        self.session(batch)
        return time.perf_counter_ns() - start


def time_queries(measured: Measured, *, num_queries: int, batch_size: int) -> dict[str, Any]:
    """Single stream: the next query when the previous one has ended."""
    for batch in measured.load_ahead(NUM_REWARM_QUERIES, batch_size):
        measured.run(batch)
    gc.disable()
    before = _contention()
    samples: list[int] = []
    while len(samples) < num_queries:
        batches = measured.load_ahead(num_queries - len(samples), batch_size)
        samples += [measured.run(batch) for batch in batches]
    after = _contention()
    gc.enable()
    return {"samples_ns": samples} | {key: after[key] - before[key] for key in before}


def run_for(measured: Measured, *, seconds: float, batch_size: int) -> dict[str, Any]:
    """Batch after batch for a time, at least three, after one that is not counted."""
    measured.run(measured.load_ahead(1, batch_size)[0])
    samples: list[int] = []
    start = time.monotonic()
    while time.monotonic() - start < seconds or len(samples) < MIN_BATCHES:
        samples += [measured.run(batch) for batch in measured.load_ahead(MIN_BATCHES, batch_size)]
    return {"samples_ns": samples, "seconds": time.monotonic() - start}


def predict(measured: Measured, *, path: str, start: int, size: int) -> dict[str, Any]:
    """Some images, one at a time as they are deployed, to their rows of a .npy file of logits."""
    import numpy as np

    artifact = measured.job.artifact
    assert artifact is not None
    assert measured.session is not None
    num_images = len(measured.images)
    logits = np.lib.format.open_memmap(
        path,
        mode="r+" if start else "w+",
        dtype=np.float32,
        shape=(num_images, *artifact.output_shape),
    )
    stop = min(start + size, num_images)
    for position in range(start, stop):
        logits[position] = measured.session(measured.images.batch(position, 1))[0]
    logits.flush()
    return {"stop": stop, "num_images": num_images}


def report_peak_memory(measured: Measured) -> dict[str, Any]:
    """The peak of this process's resident memory so far."""
    return {"peak_kib": peak_memory_kib()}


def describe(measured: Measured) -> dict[str, Any]:
    """What the engine says of itself."""
    return {"description": measured.description}


def count_operators(measured: Measured) -> dict[str, Any]:
    """Operators of the optimised graph."""
    job = measured.job
    assert job.artifact is not None
    return {"operators": job.runtime.count_operators(job.artifact, job.hardware)}


def peak_memory_kib() -> int:
    """`VmHWM` of Linux; elsewhere `ru_maxrss`, which on Linux would include the parent's peak."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def limit(hardware: Hardware) -> None:
    """Hold this process to the cores and the memory of `hardware`.

    The memory limit is `RLIMIT_DATA` (private writable memory): `RLIMIT_AS` would also count the
    address space that engines reserve and never touch.

    Raises:
        BenchmarkError: this machine cannot enforce what the profile asks for.
    """
    problem = affinity_problem(hardware.cpu_affinity)
    if problem:
        raise BenchmarkError(problem)
    if hardware.cpu_affinity:
        os.sched_setaffinity(0, hardware.cpu_affinity)
    if hardware.memory_limit_mib is not None:
        num_bytes = int(hardware.memory_limit_mib * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def _open(path: Path) -> Measured:
    plain = json.loads(path.read_text(encoding="utf-8"))
    limit(Hardware(**plain["hardware"]))  # before the runtime's module is imported
    from medlite.bench.job import Job

    return Measured(Job.read(path))


def _contention() -> dict[str, float]:
    """Counters that rise when others want the cores: read before and after a block."""
    counters = {
        "involuntary_switches": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
        "wall_seconds": time.monotonic(),
    }
    stat = Path("/proc/stat")
    if stat.exists():
        ticks = stat.read_text().split("\n", 1)[0].split()[1:]
        counters["steal_seconds"] = int(ticks[7]) / os.sysconf("SC_CLK_TCK")
    return counters


_COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "time": time_queries,
    "run_for": run_for,
    "predict": predict,
    "memory": report_peak_memory,
    "describe": describe,
    "operators": count_operators,
}

if __name__ == "__main__":
    main()
