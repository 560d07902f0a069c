"""A csv beside a folder of images: labels, groups and splits of the images."""

from __future__ import annotations

import csv
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medlite.data.folder_files import images_below
from medlite.data.image_data import BadFile
from medlite.errors import ConfigError, DataError, did_you_mean
from medlite.types import Split

logger = logging.getLogger(__name__)

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""what people call the splits, in lower case, in folders and in csv cells"""

PATIENTS = re.compile(r"patient|subject|participant", re.IGNORECASE)
"""what is in the names of columns that hold patients"""
OF_PATIENTS = re.compile(
    r"((?<!im)age|sex|gender|weight|height|size|position|orientation|birth.*|date|race)$",
    re.IGNORECASE,
)
"""how columns end that say something of patients"""


OPTIONAL = ("group", "split", "source")
"""columns that are read by these names without being asked for"""


@dataclass(frozen=True)
class CsvColumns:
    """The columns' names; None: not wanted, or for the last three their own names if present."""

    path: str
    label: str | None = None
    group: str | None = None
    split: str | None = None
    source: str | None = None

    def check(self, path: Path, header: Sequence[str]) -> None:
        """Raise for names that are not in the csv's header."""
        problems = [
            f"dataset.{kind}_column: {path.name} has no '{name}', {did_you_mean(name, header)}"
            for kind, name in vars(self).items()
            if name is not None and name not in header
        ]
        if problems:
            raise ConfigError(problems)

    def found_in(self, header: Sequence[str]) -> CsvColumns:
        """With the columns group, split and source of the header where no other was chosen."""
        unset = [kind for kind in OPTIONAL if getattr(self, kind) is None]
        return replace(self, **{kind: kind for kind in unset if kind in header})


@dataclass(frozen=True)
class CsvRow:
    """What one row says about its image; None where the csv has no such column."""

    label: str | None
    group: str | None
    split: Split | None
    source: str | None


def read_csv(
    path: Path, columns: CsvColumns, images_folder: Path, root: Path
) -> tuple[dict[Path, CsvRow], list[BadFile]]:
    """The row of each image, and the rows that name no image or one that is taken.

    The path column holds a path below `images_folder` or below `root`, in which that lies, or an
    id: the file's name without suffix, leading zeros aside.

    Raises:
        ConfigError: a column that the csv does not have.
        DataError: the csv is missing, or is not text.
    """
    find = ImageFinder(images_folder, root)
    rows: dict[Path, CsvRow] = {}
    problems = []
    header, all_cells = _read_rows(path)
    columns.check(path, header)
    columns = columns.found_in(header)
    _warn_of_unread_columns(path, columns, header)
    _warn_of_blank_groups(path, [_cell(cells, columns.group) for cells in all_cells])
    for number, cells in enumerate(all_cells, start=2):
        name = cells[columns.path]
        found = find(name)
        split = (_cell(cells, columns.split) or "").lower()
        if len(found) != 1:
            what = "several files match" if found else "no image matches"
            problems.append(BadFile(images_folder / name, f"{what} (line {number}, {path.name})"))
        elif found[0] in rows:
            problems.append(BadFile(found[0], f"named a second time (line {number}, {path.name})"))
        elif split and split not in SPLIT_NAMES:
            reason = f"split '{split}' is not train, val or test (line {number}, {path.name})"
            problems.append(BadFile(found[0], reason))
        else:
            rows[found[0]] = CsvRow(
                label=_cell(cells, columns.label),
                group=_cell(cells, columns.group) or None,
                split=SPLIT_NAMES.get(split),
                source=_cell(cells, columns.source) or None,
            )
    return rows, problems


def _cell(cells: Mapping[str, str], column: str | None) -> str | None:
    return None if column is None else cells[column]


def _warn_of_unread_columns(path: Path, columns: CsvColumns, header: Sequence[str]) -> None:
    """Say which columns seem to hold what no column is read for: patients, above all."""
    for name in sorted(set(header) - set(vars(columns).values())):
        is_patient = PATIENTS.search(name) and not OF_PATIENTS.search(name)
        if columns.group is None and is_patient:
            logger.warning(
                "%s has a column '%s', which is not read: images of one patient may fall on both "
                "sides of the split, unless you set dataset.group_column='%s'",
                *(path.name, name, name),
            )
        kind = name.lower()
        if kind in OPTIONAL and getattr(columns, kind) is None:
            logger.warning(
                "%s has a column '%s', which is not read; dataset.%s_column='%s' takes it for the "
                "%s of the images",
                *(path.name, name, kind, name, kind),
            )


def _warn_of_blank_groups(path: Path, groups: Sequence[str | None]) -> None:
    if "" in groups:
        logger.warning(
            "%d of %d rows of %s have no group: their images count as patients of their own, and "
            "may fall on both sides of the split",
            groups.count(""),
            len(groups),
            path.name,
        )


class ImageFinder:
    """Images below a folder by path, by name, or by name without suffix and leading zeros.

    A path may also start at `root`, in which the folder lies.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self._images: dict[tuple[str, str], list[Path]] = defaultdict(list)
        for image in images_below(folder):
            path, path_from_root = (image.relative_to(d).as_posix() for d in (folder, root))
            for key in self._keys(path, path_from_root, image.name, image.stem):
                self._images[key].append(image)

    def __call__(self, name: str) -> list[Path]:
        """Every image that `name` may mean: the strictest reading that finds any."""
        for key in self._keys(name, name, name, name):
            if key in self._images:
                return self._images[key]
        return []

    @staticmethod
    def _keys(path: str, path_from_root: str, name: str, stem: str) -> list[tuple[str, str]]:
        number = [("number", stem.lstrip("0"))] if stem.isdigit() else []
        paths = [("path", path), ("path from root", path_from_root)]
        return [*paths, ("name", name), ("stem", stem), *number]


def _read_rows(path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    """The columns' names, and the cells of each row by column, without blanks around them."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = [{k: v.strip() for k, v in row.items() if k is not None} for row in reader]
    except OSError as error:
        message = f"dataset.csv: {path}: {error.strerror} (a relative path starts at dataset.root)"
        raise DataError(message) from error
    except (UnicodeDecodeError, csv.Error) as error:
        message = f"dataset.csv: {path} is not a csv in UTF-8 ({error})"
        raise DataError(message) from error
    return header, rows
