"""Checkpoints that survive a kill, and that can hold nothing but tensors and plain values."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from medlite.errors import RecordError


def save_tensors(content: Any, path: Path) -> None:
    """Write tensors and plain values so that `path` is either whole or absent."""
    buffer = io.BytesIO()  # torch hides a full disk behind an error of its own
    torch.save(content, buffer)
    _save(buffer.getbuffer(), path)


def save_text(text: str, path: Path) -> None:
    """Write a text so that `path` is either whole or as it was."""
    _save(text.encode(), path)


def _save(content: bytes | memoryview, path: Path) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path: Path, *, mend: str = "delete it and run again to make it anew") -> Any:
    """Read what `save_tensors` wrote, executing nothing.

    Args:
        path: of the file.
        mend: what the user can do about a file that is refused.

    Raises:
        RecordError: the file is truncated, or holds code or objects beside tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors and plain values, which could run code when loaded"
        if "Unsupported" not in str(error) and "GLOBAL" not in str(error):
            reason = "it is not a whole checkpoint"
        raise RecordError(_refusal(path, reason, mend)) from error
    except (RuntimeError, EOFError) as error:
        raise RecordError(_refusal(path, "it is truncated or damaged", mend)) from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints through `save_tensors` and `load_tensors`.

    Lightning writes to the system's temporary directory and moves the file, which is not
    atomic across file systems: a kill in that moment leaves half a checkpoint.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None = None,
    ) -> None:
        """Write one checkpoint."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(checkpoint, target)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read one checkpoint safely."""
        return load_tensors(Path(path))


def _refusal(path: Path, reason: str, mend: str) -> str:
    return f"{path} was not loaded: {reason}; {mend}"
