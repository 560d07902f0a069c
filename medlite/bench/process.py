"""The parent's side of a measuring process: start it, ask it, and end it."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from medlite.bench.job import Job
from medlite.errors import BenchmarkError
from medlite.runtimes.threads import count_threads

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_STDERR_LINES = 12


class MeasuringProcess:
    """A fresh Python process that holds one model and answers questions about it.

    The parent sleeps while it waits (a busy one would take a core from what is measured), and
    ends the child by its own handle.

    Args:
        job: what to load.
        directory: where the job file and the standard error are kept.
        name: the stem of those files.
        timeout_seconds: for each answer.

    Raises:
        BenchmarkError: the runtime says why it cannot load the model here, or the process failed
            (with the last lines of its standard error).
    """

    def __init__(self, job: Job, *, directory: Path, name: str, timeout_seconds: float) -> None:
        if sys.platform == "win32":
            message = "measuring needs Linux or macOS: Windows has no resource limits or peaks"
            raise BenchmarkError(message)
        stem = re.sub(r"[^\w.-]+", "-", name)
        self._name = name
        self._timeout_seconds = timeout_seconds
        self._memory_limit_mib = job.hardware.memory_limit_mib
        self._stderr_path = directory / f"{stem}.stderr.txt"
        job_path = directory / f"{stem}.job.json"
        job.write(job_path)
        with self._stderr_path.open("w", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "medlite.bench.worker", str(job_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(job),
                text=True,
            )
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        assert self._process.stdout is not None
        threading.Thread(
            target=_forward, args=(self._process.stdout, self._replies), daemon=True
        ).start()
        answer = self._receive()
        if "unavailable" in answer:
            self.close()
            raise BenchmarkError(answer["unavailable"])

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command of the worker and wait for its answer.

        Raises:
            BenchmarkError: no answer in time, or the process ended.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it ended; the missing answer says why
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        """End the process; it is killed where it does not leave by itself."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=self._timeout_seconds)
        except queue.Empty as error:
            self._process.kill()
            self._process.wait()
            message = (
                f"measuring {self._name} gave no answer in {self._timeout_seconds:g} s and was "
                f"stopped (benchmark.timeout_seconds){self._stderr_tail()}"
            )
            raise BenchmarkError(message) from error
        if not line:
            raise BenchmarkError(self._explain_end())
        return json.loads(line)

    def _explain_end(self) -> str:
        code = self._process.wait()
        limited = (
            f" under its memory limit of {self._memory_limit_mib:g} MiB"
            if self._memory_limit_mib is not None
            else ""
        )
        return (
            f"the process that measured {self._name} ended with code {code}{limited}"
            f"{self._stderr_tail()}"
        )

    def _stderr_tail(self) -> str:
        lines = self._stderr_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "".join(f"\n  {line}" for line in lines[-_STDERR_LINES:])


def _environment(job: Job) -> dict[str, str]:
    threads = str(count_threads(job.hardware))
    return os.environ | {
        **dict.fromkeys(_THREAD_VARIABLES, threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # idle threads must not spin while another is timed
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def _forward(stream: IO[str], replies: queue.SimpleQueue[str]) -> None:
    """Pass on each line as it comes, and an empty string at the end."""
    for line in stream:
        replies.put(line)
    replies.put("")
