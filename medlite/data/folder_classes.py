"""From what stands in folders, csv cells and masks to named classes in an order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from medlite.data.folder_index import Entry, Index
from medlite.data.image_data import BadFile
from medlite.errors import ConfigError, DataError, did_you_mean

logger = logging.getLogger(__name__)

_DEFAULT_MASK_CLASSES = {0: "background", 1: "foreground", 255: "foreground"}


@dataclass(frozen=True)
class Classes:
    """Class names in their order, and what stands for them in the data."""

    names: tuple[str, ...]
    of_label: dict[str, int]
    """label (folder name or csv value) to class index; empty for segmentation"""
    of_value: dict[int, int]
    """mask value to class index; empty for classification"""


def name_labels(index: Index, class_names: Mapping[str | int, str] | None) -> tuple[Classes, Index]:
    """The classes of a classification index, whose entries without a class become problems.

    Args:
        index: entries with labels.
        class_names: label to class name, in order; None: the labels themselves, numbers by size.

    Raises:
        ConfigError: `class_names` that is not of that form.
        DataError: fewer than two classes.
    """
    _check_names("class_names", class_names, "{0:benign,1:malignant}")
    labels = {entry.label for entry in index.entries if entry.label}
    if class_names is None:
        names_of_labels = {label: label for label in sorted(labels, key=_rank)}
    else:
        names_of_labels = {str(label): name for label, name in class_names.items()}
    names = tuple(dict.fromkeys(names_of_labels.values()))
    if len(names) < 2:
        found = f"classification needs two classes and more, found: {', '.join(names) or 'none'}"
        raise DataError(found + index.why_missing())
    of_label = {label: names.index(name) for label, name in names_of_labels.items()}
    problems = [
        BadFile(entry.image, _problem_of(entry, of_label))
        for entry in index.entries
        if entry.label not in of_label
    ]
    known = [entry for entry in index.entries if entry.label in of_label]
    counts = Counter(of_label[entry.label or ""] for entry in known)
    for position, name in enumerate(names):
        if not counts[position]:
            logger.warning("class '%s' of dataset.class_names has no image", name)
    return Classes(names, of_label, {}), Index(known, index.problems + problems, index.others)


def _check_names(key: str, names: object, example: str) -> None:
    """Refuse what is no mapping to words.

    Raises:
        ConfigError: with `example`, which is right.
    """
    if names is None:
        return
    if not isinstance(names, Mapping) or not all(isinstance(n, str) for n in names.values()):
        problem = f"dataset.{key}: {names!r} does not map to names; write 'dataset.{key}={example}'"
        raise ConfigError([problem])


def _rank(label: str) -> tuple[bool, int, str]:
    """Numbers by size, before words by letters."""
    return (not label.isdecimal(), int(label) if label.isdecimal() else 0, label)


def _problem_of(entry: Entry, of_label: Mapping[str, int]) -> str:
    if not entry.label:
        return "has no label"
    hint = did_you_mean(entry.label, of_label)
    return f"its label '{entry.label}' is not in dataset.class_names, {hint}"


def name_mask_values(mask_classes: Mapping[int, str] | None) -> Classes:
    """The classes of masks.

    Args:
        mask_classes: value to class name, in order, the background first; values may share a
            name. None: 0 background, 1 and 255 foreground.

    Raises:
        ConfigError: values that are not whole numbers, or fewer than two classes.
    """
    _check_names("mask_classes", mask_classes, "{0:background,255:lesion}")
    names_of_values = _DEFAULT_MASK_CLASSES if mask_classes is None else dict(mask_classes)
    wrong = [value for value in names_of_values if not str(value).isdigit()]
    if wrong:
        message = f"dataset.mask_classes: {wrong} are not pixel values (whole numbers)"
        raise ConfigError([message])
    names = tuple(dict.fromkeys(names_of_values.values()))
    if len(names) < 2:
        message = "dataset.mask_classes: two classes and more are needed, the background first"
        raise ConfigError([message])
    of_value = {int(value): names.index(name) for value, name in names_of_values.items()}
    return Classes(names, {}, of_value)
