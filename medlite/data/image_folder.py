"""A user's own images: a folder of PNG, JPEG or TIFF files, with or without a csv.

Classification: `root/<class>/...` (splits above or right below the classes), or a csv that names
each image and its label. Segmentation: `root/images/` and `root/masks/` with the same file
names (suffix aside), or both in `root/{train,val,test}/`; a csv may add groups and splits.
Folders of splits may also be called `Training`, `valid`, `validation`, `Testing` and the like.

Splits that are not given are made, whole groups together, stratified by label (for masks by the
rarest class in them).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medlite.data.augmentation import RECIPES
from medlite.data.folder_check import Checked, Preparation, check_files, samples_of
from medlite.data.folder_classes import Classes, name_labels, name_mask_values
from medlite.data.folder_csv import CsvColumns
from medlite.data.folder_files import in_words
from medlite.data.folder_index import (
    Index,
    add_csv,
    index_class_csv,
    index_class_folders,
    index_mask_folders,
)
from medlite.data.image_data import SPLITS, BadFile, ImageData, ImageSplit, sides_of
from medlite.data.splits import SplitRatios, complete_splits, counts_by_split, warn_of_leaks
from medlite.errors import ConfigError, DataError, did_you_mean
from medlite.types import DataSpec, Split, Task

logger = logging.getLogger(__name__)

_NAMES_OF_TASK = {"classification": "class_names", "segmentation": "mask_classes"}


def image_folder(
    *,
    root: str | Path,
    task: Task = "classification",
    image_size: int | Sequence[int] = (224, 224),
    in_channels: int = 3,
    csv: str | Path | None = None,
    path_column: str = "path",
    label_column: str = "label",
    group_column: str | None = None,
    split_column: str | None = None,
    source_column: str | None = None,
    class_names: Mapping[str | int, str] | None = None,
    mask_classes: Mapping[int, str] | None = None,
    intensity_range: Sequence[float] | None = None,
    modality: str = "other",
    group_kind: str = "patient",
    spacing_mm: Sequence[float] | None = None,
    origin: str = "the user's own images",
    val_ratio: float = 0.1,
    test_ratio: float = 0.2,
    split_seed: int = 0,
    on_bad_file: Literal["error", "skip"] = "error",
) -> ImageData:
    """Classify or segment the images of a folder, see above for its layout.

    Every file is opened first; bad ones are all reported in one error, or left out and counted.

    Args:
        root: the folder.
        task: "classification" or "segmentation".
        image_size: (H, W) to which everything is resized; a number alone means a square.
        in_channels: 1 (grey) or 3 (RGB); colours are turned into grey, and grey is repeated.
        csv: path of the csv; a relative one starts at `root`.
        path_column: holds a path below the image folder or `root`, or an id, see `read_csv`.
        label_column: holds the label (classification).
        group_column: holds the patient; None, here and below: "group" where the csv has it.
        split_column: holds train, val or test; None: "split".
        source_column: holds the site or scanner, by which failures are grouped; None: "source".
        class_names: label to class name, in order; None: the sorted labels.
        mask_classes: mask value to class name, the background first, see `name_mask_values`.
        intensity_range: values that become -1 and 1, such as [0, 4095] for 12 bits in a 16-bit
            file; needed for signed, 32-bit and float files. None: the type's whole range.
        modality: a key of `RECIPES`; decides the augmentation.
        group_kind: what the csv's groups are, such as "patient"; "image" where it has none.
        spacing_mm: of the pixels after resizing, where it is known.
        origin: where the images come from, and their licence, for the card.
        val_ratio: share of the groups for validation, where medlite splits.
        test_ratio: share of the groups for testing, where medlite splits.
        split_seed: of that choice.
        on_bad_file: "error", or "skip" to go on with the sound files.

    Raises:
        ConfigError: wrong arguments, or columns that the csv does not have.
        DataError: bad files, groups in two splits, too few images.
    """
    folder = _checked(root, on_bad_file, modality)
    columns = CsvColumns(path_column, label_column, group_column, split_column, source_column)
    names = {"class_names": class_names, "mask_classes": mask_classes}
    classes, index = _find(task, folder, csv, columns, names)
    preparation = Preparation(sides_of(image_size), in_channels, intensity_range, classes.of_value)
    checked, bad_files = check_files(index.entries, preparation)
    skipped = _skip_or_raise((*index.problems, *bad_files), on_bad_file)
    groups = [c.entry.group or c.entry.image.relative_to(folder).as_posix() for c in checked]
    given, labels = [c.entry.split for c in checked], _strata(checked, classes)
    ratios = SplitRatios(val_ratio, test_ratio)
    positions = complete_splits(given, groups, labels, ratios, seed=split_seed)
    spec = DataSpec(
        name=f"image_folder/{folder.resolve().name}",
        task=task,
        group_kind=group_kind if any(c.entry.group for c in checked) else "image",
        modality=modality,
        origin=origin,
        spacing_mm=tuple(spacing_mm) if spacing_mm else None,
        num_skipped=len(skipped),
        **_counts(checked, groups, positions, classes),
        **_form(preparation, classes),
    )
    train, val, test = _splits(checked, groups, positions, classes, preparation)
    return warn_of_leaks(ImageData(spec=spec, train=train, val=val, test=test, skipped=skipped))


def _checked(root: str | Path, on_bad_file: str, modality: str) -> Path:
    """The folder, once these arguments are known to be sound."""
    if modality not in RECIPES:
        hint = did_you_mean(str(modality), RECIPES)
        raise ConfigError([f"dataset.modality: {modality!r} is not known, {hint}"])
    if on_bad_file not in ("error", "skip"):
        raise ConfigError([f"dataset.on_bad_file: {on_bad_file!r} is not error or skip"])
    folder = Path(root).expanduser()
    if not folder.is_dir():
        message = f"dataset.root: {folder} is not a folder"
        raise DataError(message)
    return folder


def _find(
    task: str,
    folder: Path,
    csv: str | Path | None,
    columns: CsvColumns,
    names: Mapping[str, Mapping[Any, str] | None],
) -> tuple[Classes, Index]:
    """The classes, and the samples that the folder and its csv name."""
    if task not in _NAMES_OF_TASK:
        raise ConfigError([f"dataset.task: {task!r} is not classification or segmentation"])
    own = _NAMES_OF_TASK[task]
    (other,) = names.keys() - {own}
    if names[other] is not None:
        raise ConfigError([f"dataset.{other}: task={task} takes {own} instead"])
    if task == "classification":
        index = (
            index_class_folders(folder)
            if csv is None
            else index_class_csv(folder, folder / csv, columns)
        )
        classes, index = name_labels(index, names[own])
    else:
        classes, index = name_mask_values(names[own]), index_mask_folders(folder)
        if csv is not None:
            index = add_csv(index, folder, folder / csv, replace(columns, label=None))
    _tell_of_others(index)
    return classes, index


def _tell_of_others(index: Index) -> None:
    """Warn of files that are no images, or refuse a folder that has nothing else."""
    if not index.others:
        return
    if not index.entries and not index.problems:
        message = f"dataset.root: there are no images{index.why_missing()}"
        raise DataError(message)
    logger.warning(in_words(index.others))


def _skip_or_raise(bad_files: Sequence[BadFile], on_bad_file: str) -> tuple[BadFile, ...]:
    if bad_files and on_bad_file == "error":
        lines = "\n".join(f"  {bad_file}" for bad_file in bad_files)
        message = (
            f"the dataset has {len(bad_files)} bad file(s):\n{lines}\n"
            "mend or remove them, or leave them out with dataset.on_bad_file=skip"
        )
        raise DataError(message)
    if bad_files:  # no paths here: logs may leave the machine
        logger.warning("%d bad file(s) are left out", len(bad_files))
    return tuple(bad_files)


def _strata(checked: Sequence[Checked], classes: Classes) -> list[str]:
    """Each sample's class, or of those in its mask the class that the fewest masks hold."""
    if classes.of_label:
        return [classes.names[k] for k in _labels(checked, classes)]
    holds = np.array([c.pixel_counts > 0 for c in checked]).reshape(-1, len(classes.names))
    num_masks = np.where(holds, holds.sum(0), len(checked) + 1)
    return [classes.names[k] for k in num_masks.argmin(1)] if checked else []


def _labels(checked: Sequence[Checked], classes: Classes) -> np.ndarray:
    """(N,) int64 class indices (classification)."""
    return np.array([classes.of_label[c.entry.label or ""] for c in checked], np.int64)


def _counts(
    checked: Sequence[Checked],
    groups: Sequence[str],
    positions: Mapping[Split, Sequence[int]],
    classes: Classes,
) -> dict[str, Any]:
    """What the description says of numbers."""
    of_train = [checked[p] for p in positions["train"]]
    if classes.of_label:
        counts = np.bincount(_labels(of_train, classes), minlength=len(classes.names))
    else:
        counts = np.sum([c.pixel_counts for c in of_train], axis=0)
    num_samples, num_groups = counts_by_split(
        {name: [groups[p] for p in chosen] for name, chosen in positions.items()}
    )
    return {
        "class_counts": tuple(int(count) for count in counts),
        "num_samples": num_samples,
        "num_groups": num_groups,
    }


def _form(preparation: Preparation, classes: Classes) -> dict[str, Any]:
    """What the description says of images and classes."""
    height, width = preparation.image_size
    is_binary = len(classes.names) == 2 and not classes.of_label
    limits = preparation.intensity_range
    scale = f"[{limits[0]:g}, {limits[1]:g}]" if limits else "the whole range of the file's type"
    return {
        "labels": "binary" if is_binary else "multiclass",
        "in_channels": preparation.in_channels,
        "num_classes": 1 if is_binary else len(classes.names),
        "image_size": (height, width),
        "class_names": classes.names,
        "provenance": "real, as the user declares",
        "preprocessing": (
            f"resized to {height}x{width} (bilinear, masks nearest); {scale} scaled to [-1, 1]"
        ),
    }


def _splits(
    checked: Sequence[Checked],
    groups: Sequence[str],
    positions: Mapping[Split, Sequence[int]],
    classes: Classes,
    preparation: Preparation,
) -> list[ImageSplit]:
    """Train, val and test."""
    splits = []
    for chosen in (positions[name] for name in SPLITS):
        own = [checked[p] for p in chosen]
        labels = _labels(own, classes) if classes.of_label else None
        samples = samples_of(own, labels, preparation)
        sources = tuple(each.entry.source for each in own)
        patients = tuple(groups[p] for p in chosen)
        splits.append(ImageSplit(samples, patients, sources=sources if any(sources) else None))
    return splits
