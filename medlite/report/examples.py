"""A few test images with what was true and what was predicted, kept beside the result.

Shapes: n examples, N samples, C channels, K logits.
"""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medlite.errors import RecordError

if TYPE_CHECKING:
    from medlite.types import Predictions

LOGITS = "logits:"
COLOURS = np.array(
    [(0, 0, 0), (255, 158, 27), (0, 190, 196), (214, 88, 212), (120, 200, 60), (90, 130, 255)]
)
"""of the classes of a mask; the first is never drawn, later classes begin again at the second"""
SIDE = 168
"""pixels of a picture's longer side"""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """images: (n, C, H, W). targets: (n,), (n, K) or (n, H, W). logits: by candidate."""

    images: np.ndarray
    targets: np.ndarray
    logits: Mapping[str, np.ndarray]


def choose_examples(predictions: Predictions, count: int = 6) -> list[int]:
    """Positions spread evenly over the test split, so that nobody picked the good ones."""
    total = len(predictions.logits)
    return sorted(set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()))


def write_examples(
    path: Path, *, images: np.ndarray, targets: np.ndarray, logits: Mapping[str, np.ndarray]
) -> Path:
    """Keep examples as a small npz; of a volume, the slice with the most annotated pixels.

    Args:
        path: the npz file.
        images: (n, C, H, W[, D]).
        targets: as `Batch.target`.
        logits: candidate -> (n, K) or (n, K, H, W[, D]).

    Raises:
        RecordError: the file cannot be written.
    """
    if images.ndim == 5:
        depth = chosen_slices(images, targets)
        images = take_slices(images, depth)
        if targets.ndim == 4:
            targets = take_slices(targets, depth)
        logits = {k: take_slices(v, depth) if v.ndim == 5 else v for k, v in logits.items()}
    arrays: dict[str, Any] = {f"{LOGITS}{k}": v.astype(np.float32) for k, v in logits.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images.astype(np.float32), targets=targets, **arrays)
    try:
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        path.unlink(missing_ok=True)
        message = f"{path} could not be written: {error.strerror}"
        raise RecordError(message) from error
    return path


def chosen_slices(images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(n,) position along the last axis."""
    if targets.ndim == 4:
        return (targets > 0).sum((1, 2)).argmax(-1)
    return np.full(len(images), images.shape[-1] // 2)


def take_slices(volumes: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """(n, ..., D) -> (n, ...)."""
    return np.stack([volume[..., z] for volume, z in zip(volumes, depth, strict=True)])


def read_examples(path: Path) -> Examples:
    """The inverse of `write_examples`.

    Raises:
        RecordError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            logits = {k.removeprefix(LOGITS): arrays[k] for k in arrays if k.startswith(LOGITS)}
            return Examples(images=arrays["images"], targets=arrays["targets"], logits=logits)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        message = f"{path} is not a readable examples file ({error}); run stage report again"
        raise RecordError(message) from error


def as_rgb(image: np.ndarray) -> np.ndarray:
    """(C, H, W) of any scale -> uint8 (H, W, 3), stretched between its 1st and 99th percentile."""
    picture = image[:3] if len(image) == 3 else np.repeat(image[:1], 3, axis=0)
    low, high = np.percentile(picture, (1, 99))
    scaled = np.clip((picture - low) / max(high - low, 1e-6), 0, 1)
    return (255 * scaled).round().astype(np.uint8).transpose(1, 2, 0)


def enlarged(picture: np.ndarray) -> np.ndarray:
    """Repeat pixels until the longer side is about SIDE."""
    factor = max(1, SIDE // max(picture.shape[:2]))
    return picture.repeat(factor, 0).repeat(factor, 1)


def overlay(image: np.ndarray, mask: np.ndarray, truth: np.ndarray | None = None) -> np.ndarray:
    """A mask in colour over its image, with the outline of the truth in white.

    Args:
        image: (C, H, W).
        mask: (H, W) class of each pixel.
        truth: (H, W), None: no outline.
    """
    picture, classes = enlarged(as_rgb(image)).astype(float), enlarged(mask)
    colours = COLOURS[np.where(classes > 0, (classes - 1) % (len(COLOURS) - 1) + 1, 0)]
    weight = np.where(classes > 0, 0.5, 0.0)[..., None]
    picture = picture * (1 - weight) + colours * weight
    if truth is not None:
        picture[outline(enlarged(truth))] = 255
    return picture.round().astype(np.uint8)


def outline(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of a class that touch another one."""
    padded = np.pad(mask, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return (mask > 0) & np.any([mask != side for side in neighbours], axis=0)


def as_data_uri(picture: np.ndarray) -> str:
    """uint8 (H, W, 3) as a PNG inside a page."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
