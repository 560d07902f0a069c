"""Which files of a folder are samples: images with their label or mask, group and split."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from medlite.data.folder_csv import SPLIT_NAMES, CsvColumns, read_csv
from medlite.data.folder_files import images_below, in_words, others_below
from medlite.data.image_data import SPLITS, BadFile
from medlite.errors import DataError
from medlite.types import Split

logger = logging.getLogger(__name__)

_NUM_PROBLEMS_NAMED = 3


@dataclass(frozen=True)
class Entry:
    """One sample as the folder and the csv describe it, not yet opened."""

    image: Path
    label: str | None = None
    """folder name or csv value (classification)"""
    mask: Path | None = None
    """(segmentation)"""
    group: str | None = None
    """None: the image stands for itself"""
    split: Split | None = None
    """None: to be chosen"""
    source: str | None = None
    """the site, scanner ... that it is from"""


@dataclass(frozen=True)
class Index:
    """The samples that were found, and what is wrong with others."""

    entries: list[Entry]
    problems: list[BadFile]
    others: Counter[str] = field(default_factory=Counter)
    """see `others_below`"""

    def why_missing(self) -> str:
        """What may explain that samples are missing, for the end of an error."""
        lines = [f"\n  {problem}" for problem in self.problems[:_NUM_PROBLEMS_NAMED]]
        if len(self.problems) > len(lines):
            lines.append(f"\n  ... {len(self.problems)} of them")
        if self.others:
            lines.append(f"\n  {in_words(self.others)}")
        return "".join(lines)


def index_class_folders(root: Path) -> Index:
    """Classification by folders: `<class>/...`, with the splits above or right below the classes.

    Those are `{train,val,test}/<class>/...` or `<class>/{train,val,test}/...`.

    Raises:
        DataError: the sub-folders are plainly something else than classes.
    """
    class_folders = [
        (split, class_folder)
        for split, folder in _split_folders(root)
        for class_folder in _sub_folders(folder)
    ]
    _check_class_names(root, {folder.name for _, folder in class_folders})
    entries = [
        Entry(image, label=class_folder.name, split=split or inner_split)
        for split, class_folder in class_folders
        for inner_split, folder in (
            _splits_below(class_folder) if split is None else [(None, class_folder)]
        )
        for image in images_below(folder)
    ]
    folders = [folder for _, folder in class_folders]
    strays = {image for folder in folders for image in images_below(folder)}
    strays -= {entry.image for entry in entries}
    reason = "lies beside the folders of the splits, in none of them"
    problems = [BadFile(image, reason) for image in sorted(strays)]
    num_unused = len(images_below(root)) - len(entries) - len(strays)
    if num_unused:
        logger.warning("%d image(s) below %s lie in no class and are not used", num_unused, root)
    return Index(entries, problems, _others(folders or [root]))


def _splits_below(class_folder: Path) -> list[tuple[Split | None, Path]]:
    """(split, folder) of folders with names of splits, or (None, class_folder) without any."""
    folders = _sub_folders(class_folder)
    splits = [(SPLIT_NAMES.get(folder.name.lower()), folder) for folder in folders]
    return [each for each in splits if each[0]] or [(None, class_folder)]


def _check_class_names(root: Path, names: set[str]) -> None:
    lower = {name.lower() for name in names}
    if lower == {"images", "masks"}:
        message = (
            f"dataset.root: {root} holds {' and '.join(sorted(names))}, which are no classes; "
            "set dataset.task=segmentation"
        )
        raise DataError(message)
    if lower & SPLIT_NAMES.keys():
        message = (
            f"dataset.root: {root} has the sub-folders {', '.join(sorted(names))}, of which some "
            "are named like splits, not classes; put the classes into train/, val/ and test/, or "
            "rename them"
        )
        raise DataError(message)


def index_class_csv(root: Path, csv: Path, columns: CsvColumns) -> Index:
    """Classification by the rows of a csv, see `read_csv`."""
    folder = _images_folder(root)
    rows, problems = read_csv(csv, columns, folder, root)
    entries = [
        Entry(image, label=row.label, group=row.group, split=row.split, source=row.source)
        for image, row in rows.items()
    ]
    num_unnamed = len(images_below(folder)) - len(entries)
    if num_unnamed:
        logger.warning("%d image(s) below %s have no row in %s", num_unnamed, folder, csv.name)
    return Index(entries, problems, others_below(folder))


def index_mask_folders(root: Path) -> Index:
    """Segmentation by `images/` and `masks/`, in `root` or in each of `{train,val,test}/`.

    An image and its mask have the same path below their folders, suffix aside.
    """
    entries, problems, folders = [], [], []
    for split, folder in _split_folders(root):
        folders += [folder / "images", folder / "masks"]
        images, masks = (_by_stem(folder / name) for name in ("images", "masks"))
        problems += [BadFile(images[s], "has no mask") for s in sorted(images.keys() - masks)]
        problems += [BadFile(masks[s], "has no image") for s in sorted(masks.keys() - images)]
        entries += [
            Entry(images[stem], mask=masks[stem], split=split)
            for stem in sorted(images.keys() & masks)
        ]
    return Index(entries, problems, _others(folders))


def add_csv(index: Index, root: Path, csv: Path, columns: CsvColumns) -> Index:
    """A segmentation index with the groups and splits of a csv, see `read_csv`."""
    rows, problems = read_csv(csv, columns, _images_folder(root), root)
    entries = [
        replace(entry, group=row.group, split=row.split or entry.split, source=row.source)
        for entry in index.entries
        if (row := rows.get(entry.image))
    ]
    unnamed = [entry.image for entry in index.entries if entry.image not in rows]
    problems += [BadFile(image, f"has no row in {csv.name}") for image in unnamed]
    return Index(entries, index.problems + problems, index.others)


def _others(folders: Iterable[Path]) -> Counter[str]:
    return sum((others_below(folder) for folder in folders), Counter())


def _images_folder(root: Path) -> Path:
    return root / "images" if (root / "images").is_dir() else root


def _split_folders(root: Path) -> Iterator[tuple[Split | None, Path]]:
    """(split, folder) of `train/` and its siblings, or (None, root) where there is no `train/`.

    They may have any name of `SPLIT_NAMES`, such as `Training/`.
    """
    folders = {folder: SPLIT_NAMES.get(folder.name.lower()) for folder in _sub_folders(root)}
    if "train" not in folders.values():
        yield None, root
        return
    for name in SPLITS:
        yield from ((name, folder) for folder, split in folders.items() if split == name)


def _sub_folders(folder: Path) -> list[Path]:
    """Sorted; hidden ones are left out."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _by_stem(folder: Path) -> dict[str, Path]:
    """Images by their path below `folder` without suffix.

    Raises:
        DataError: no such folder, or two files that differ in their suffix alone.
    """
    if not folder.is_dir():
        message = f"{folder} does not exist; segmentation needs images/ and masks/"
        raise DataError(message)
    by_stem: dict[str, Path] = {}
    for image in images_below(folder):
        stem = image.relative_to(folder).with_suffix("").as_posix()
        if stem in by_stem:
            message = f"{by_stem[stem]} and {image} differ in their suffix alone; keep one of them"
            raise DataError(message)
        by_stem[stem] = image
    return by_stem
