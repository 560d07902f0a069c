"""Opens every file before training, so that a bad one is known now and not in the last epoch."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from rich.progress import track

from medlite.data.folder_index import Entry
from medlite.data.image_data import ArraySamples, BadFile, Samples, digest_of
from medlite.data.image_io import UNREADABLE, prepare_image, prepare_mask, read_image, read_mask
from medlite.errors import ConfigError

_NUM_WITHOUT_PROGRESS_BAR = 500
_MAX_BYTES_IN_MEMORY = 2**30


@dataclass(frozen=True)
class Preparation:
    """How files become arrays; see `prepare_image` and `prepare_mask`.

    Args:
        image_size: (H, W).
        in_channels: 1 or 3.
        intensity_range: values that become -1 and 1; None: the whole range of the type.
        class_of_value: mask value to class index; empty for classification.

    Raises:
        ConfigError: values that make no image.
    """

    image_size: Sequence[int]
    in_channels: int
    intensity_range: Sequence[float] | None
    class_of_value: dict[int, int]

    def __post_init__(self) -> None:
        problems = []
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            size = list(self.image_size)
            problems.append(f"dataset.image_size: {size} is not [height, width] or one side")
        if self.in_channels not in (1, 3):
            problems.append(f"dataset.in_channels: {self.in_channels} is not 1 (grey) or 3 (RGB)")
        limits = self.intensity_range
        if limits is not None and (len(limits) != 2 or limits[0] >= limits[1]):
            problems.append(f"dataset.intensity_range: {list(limits)} is not [low, high]")
        if problems:
            raise ConfigError(problems)

    @property
    def num_bytes(self) -> int:
        """Of one prepared sample in memory."""
        return math.prod(self.image_size) * (4 * self.in_channels + bool(self.class_of_value))

    @property
    def num_mask_classes(self) -> int:
        """Classes that a mask may hold."""
        return len(set(self.class_of_value.values()))

    def prepare_image(self, stored: np.ndarray) -> np.ndarray:
        """(C, H, W) float32 of an array that was read."""
        return prepare_image(
            stored,
            image_size=self.image_size,
            in_channels=self.in_channels,
            intensity_range=self.intensity_range,
        )

    def prepare_mask(self, stored: np.ndarray) -> np.ndarray:
        """(H, W) int64 of an array that was read."""
        return prepare_mask(stored, image_size=self.image_size, class_of_value=self.class_of_value)


@dataclass(frozen=True)
class Checked:
    """A sample whose files are sound."""

    entry: Entry
    digest: str
    """of the image file"""
    pixel_counts: np.ndarray
    """prepared pixels of each class index (segmentation); empty otherwise"""
    image: np.ndarray | None
    mask: np.ndarray | None
    """prepared arrays, where memory can hold them all"""


def check_files(
    entries: Sequence[Entry], preparation: Preparation
) -> tuple[list[Checked], list[BadFile]]:
    """Open, decode and prepare every image and mask, in threads.

    Returns:
        The sound samples in the order of `entries`, and what is wrong with the others.
    """
    fits_memory = len(entries) * preparation.num_bytes <= _MAX_BYTES_IN_MEMORY

    def check(entry: Entry) -> Checked | BadFile:
        return _check(entry, preparation, keeps_arrays=fits_memory)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        outcomes = list(
            track(
                pool.map(check, entries),
                "Checking images",
                total=len(entries),
                disable=len(entries) <= _NUM_WITHOUT_PROGRESS_BAR,
            )
        )
    return (
        [outcome for outcome in outcomes if isinstance(outcome, Checked)],
        [outcome for outcome in outcomes if isinstance(outcome, BadFile)],
    )


def _check(entry: Entry, preparation: Preparation, *, keeps_arrays: bool) -> Checked | BadFile:
    try:
        digest = hashlib.sha256(entry.image.read_bytes()).hexdigest()
        stored = read_image(entry.image)
        image = preparation.prepare_image(stored)
    except UNREADABLE as error:
        return BadFile(entry.image, str(error) or type(error).__name__)
    if entry.mask is None:
        return Checked(entry, digest, np.zeros(0, int), image if keeps_arrays else None, None)
    try:
        stored_mask = read_mask(entry.mask)
        if stored_mask.shape != stored.shape[:2]:
            reason = f"is {_size(stored_mask)}, but its image {entry.image} is {_size(stored)}"
            return BadFile(entry.mask, reason)
        mask = preparation.prepare_mask(stored_mask)
    except UNREADABLE as error:
        return BadFile(entry.mask, str(error) or type(error).__name__)
    counts = np.bincount(mask.ravel(), minlength=preparation.num_mask_classes)
    if not keeps_arrays:
        return Checked(entry, digest, counts, None, None)
    return Checked(entry, digest, counts, image, mask.astype(np.uint8))


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"


def samples_of(
    checked: Sequence[Checked], classes: np.ndarray | None, preparation: Preparation
) -> Samples:
    """Samples from kept arrays, or from the files where none were kept.

    Args:
        checked: the samples of one split, at least one.
        classes: (N,) class indices; None for segmentation.
        preparation: how files become arrays.
    """
    if checked[0].image is None:
        return FileSamples(checked, classes, preparation)
    images = np.stack([sample.image for sample in checked if sample.image is not None])
    masks = [sample.mask for sample in checked if sample.mask is not None]
    return ArraySamples(images, np.stack(masks) if classes is None else classes)


@dataclass(frozen=True)
class FileSamples:
    """Samples that are read from their files each time; arguments as in `samples_of`."""

    checked: Sequence[Checked]
    classes: np.ndarray | None
    preparation: Preparation

    def __len__(self) -> int:
        return len(self.checked)

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        entry = self.checked[position].entry
        image = self.preparation.prepare_image(read_image(entry.image))
        if self.classes is not None:
            return image, np.asarray(self.classes[position])
        assert entry.mask is not None
        return image, self.preparation.prepare_mask(read_mask(entry.mask))

    def image_digests(self) -> tuple[str, ...]:
        """Digests of the image files."""
        return tuple(sample.digest for sample in self.checked)

    def target_digest(self) -> str:
        """Digest of the classes, or of the mask files."""
        if self.classes is not None:
            return digest_of(self.classes)
        digest = hashlib.sha256()
        for sample in self.checked:
            assert sample.entry.mask is not None
            digest.update(sample.entry.mask.read_bytes())
        return digest.hexdigest()
