"""Trained weights, kept by what made them, so that no baseline is trained twice."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medlite.config import digest
from medlite.errors import RecordError
from medlite.tasks.checkpoints import load_tensors, save_tensors, save_text

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One place in the store: weights, the state that rebuilds their net, and how they came."""

    directory: Path

    @property
    def key(self) -> str:
        """What names the entry."""
        return self.directory.name

    @property
    def is_done(self) -> bool:
        """Whether the weights are whole and there: the record is written last.

        Weights that somebody deleted are made anew.
        """
        return self._record_file.exists() and self.weights_file.exists()

    @property
    def _record_file(self) -> Path:
        return self.directory / "entry.json"

    @property
    def weights_file(self) -> Path:
        """Weights and state."""
        return self.directory / "weights.pt"

    @property
    def fit_directory(self) -> Path:
        """Where checkpoints live while the entry is being made."""
        return self.directory / "fit"

    def save(self, weights: Mapping[str, Any], state: Any, record: Mapping[str, Any]) -> None:
        """Finish the entry and drop its checkpoints."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._record_file.unlink(missing_ok=True)
        save_tensors({"weights": dict(weights), "state": state}, self.weights_file)
        save_text(json.dumps(record), self._record_file)
        shutil.rmtree(self.fit_directory, ignore_errors=True)

    def load(self) -> tuple[dict[str, Any], Any]:
        """Weights and state.

        Raises:
            RecordError: the file is damaged or holds more than tensors.
        """
        content = load_tensors(self.weights_file)
        return content["weights"], content["state"]

    def record(self) -> dict[str, Any]:
        """What was written beside the weights: curves, seconds, metrics."""
        return json.loads(self._record_file.read_text())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while the entry is made; a second process waits for it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.directory / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.info("waiting for another process that is making %s", self.directory)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


@dataclass(frozen=True)
class Store:
    """A directory of entries."""

    root: Path

    def entry(self, label: str, made_of: Mapping[str, Any]) -> Entry:
        """The entry for what is made of these values; `label` is for people."""
        return Entry(self.root / f"{label}-{digest(made_of)}")

    def weights_file(self, key: str) -> Path:
        """Of the entry with this key."""
        return Entry(self.root / key).weights_file


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a run directory for this process alone.

    Raises:
        RecordError: another process works in it.
    """
    message = (
        f"another process is working in {directory}: wait for it, or give this run its own name "
        "with name=..."
    )
    with held(directory / ".lock", message):
        yield


@contextmanager
def held(lock_file: Path, message: str) -> Iterator[None]:
    """Hold a lock, or say at once that another process has it.

    Raises:
        RecordError: with `message`.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RecordError(message) from error
    try:
        yield
    finally:
        lock.release()
