"""What every source of images hands over: samples in three splits, and their description."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from medlite.errors import ConfigError
from medlite.types import DataSpec, Split

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def sides_of(image_size: int | Sequence[int]) -> tuple[int, ...]:
    """The sides that `dataset.image_size` asks for; a number alone means a square.

    Raises:
        ConfigError: neither a whole number nor a list of them.

    >>> sides_of(64)
    (64, 64)
    """
    sides = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    if not all(isinstance(side, int) for side in sides):
        problem = (
            f"dataset.image_size: {image_size!r} is not a whole number or a list of them, such as "
            "64 or [64,48]"
        )
        raise ConfigError([problem])
    return sides


class Samples(Protocol):
    """The images and targets of one split, by position."""

    def __len__(self) -> int:
        """Number of samples N."""
        ...

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (C, H, W[, D]) float32, and its target.

        The target is () int64 for classes, (K,) float32 for multi-label, (H, W[, D]) int64
        for segmentation.
        """
        ...

    def image_digests(self) -> Sequence[str]:
        """A digest of each image's content: equal digests are exact duplicates."""
        ...

    def target_digest(self) -> str:
        """One digest of all targets."""
        ...


@dataclass(frozen=True)
class ArraySamples:
    """Samples that lie in memory; an image is `images[i] * scale + offset`.

    Args:
        images: (N, C, H, W[, D]) of any number type.
        targets: (N,) integers, (N, K) float32 or (N, H, W[, D]) integers.
        scale: for example 2 / 255, which with offset -1 takes 8-bit images to [-1, 1].
        offset: added after scaling.
    """

    images: np.ndarray
    targets: np.ndarray
    scale: float = 1.0
    offset: float = 0.0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        image = self.images[position].astype(np.float32)
        image = image * np.float32(self.scale) + np.float32(self.offset)
        target = np.asarray(self.targets[position])
        is_integer = np.issubdtype(target.dtype, np.integer)
        return image, target.astype(np.int64 if is_integer else np.float32)

    def image_digests(self) -> tuple[str, ...]:
        """Digests of the stored arrays."""
        return tuple(digest_of(image) for image in self.images)

    def target_digest(self) -> str:
        """Digest of the stored targets."""
        return digest_of(self.targets)


@dataclass(frozen=True)
class ImageSplit:
    """One split; `groups[i]` names the patient (lesion, image) that sample i belongs to.

    regions: where the finding of each classified image is, bool (N, H, W[, D]), where it is known;
    nothing learns from it. sources: the site, scanner or study of each image, None where unknown.
    """

    samples: Samples
    groups: tuple[str, ...]
    regions: np.ndarray | None = None
    sources: tuple[str | None, ...] | None = None

    def __post_init__(self) -> None:
        assert len(self.samples) == len(self.groups)
        assert self.regions is None or len(self.regions) == len(self.samples)
        assert self.sources is None or len(self.sources) == len(self.samples)


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A dataset as medlite knows it.

    Group ids and file names identify patients: they stay in `groups` and `skipped`, and
    nothing here sends them anywhere.
    """

    spec: DataSpec
    train: ImageSplit
    val: ImageSplit
    test: ImageSplit
    skipped: tuple[BadFile, ...] = ()
    sides: tuple[int, ...] = ()
    """of the squares or cubes that its source has, where there is a choice of some"""

    def split(self, name: Split) -> ImageSplit:
        """The split of that name."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def split_assignment(self) -> dict[str, list[str]]:
        """The sorted group ids of each split, to be saved with a run."""
        return {name: sorted(set(self.split(name).groups)) for name in SPLITS}

    @cached_property
    def fingerprint(self) -> str:
        """A digest that changes when the description, the splits, an image or a target does."""
        digest = hashlib.sha256(json.dumps(asdict(self.spec), sort_keys=True).encode())
        for name in SPLITS:
            split = self.split(name)
            parts = (*split.groups, *split.samples.image_digests(), split.samples.target_digest())
            digest.update("\0".join((name, *parts)).encode())
        return digest.hexdigest()


def digest_of(array: np.ndarray) -> str:
    """Digest of an array's shape, type and values."""
    header = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()
