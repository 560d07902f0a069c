"""Which files below a folder are images, and which others lie there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from medlite.data.image_io import IMAGE_SUFFIXES

_COMPANIONS = frozenset({".csv", ".db", ".ini", ".json", ".md", ".txt", ".xlsx", ".xml"})
"""what lies beside images and is none"""

_NUM_NAMED = 4


def images_below(folder: Path) -> list[Path]:
    """All image files in and under `folder`, sorted; hidden files and folders are left out."""
    return sorted(path for path in _visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES)


def others_below(folder: Path) -> Counter[str]:
    """How many files of each suffix in and under `folder` may be images that cannot be read."""
    known = IMAGE_SUFFIXES | _COMPANIONS
    others = [path for path in _visible(folder) if path.suffix.lower() not in known]
    return Counter(_kind(path.name.lower()) for path in others if path.is_file())


def in_words(others: Counter[str]) -> str:
    """What is said of files that `others_below` counted.

    >>> in_words(Counter({".dcm": 7}))
    '7 other file(s) are left out (7 .dcm); images are .jpeg, .jpg, .png, .tif or .tiff'
    """
    named = [f"{count} {kind}" for kind, count in others.most_common(_NUM_NAMED)]
    named += ["..."] * (len(others) > _NUM_NAMED)
    *first, last = sorted(IMAGE_SUFFIXES)
    return (
        f"{others.total()} other file(s) are left out ({', '.join(named)}); "
        f"images are {', '.join(first)} or {last}"
    )


def _visible(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _kind(name: str) -> str:
    """The suffix, if it is like one: what follows the dot of a name may be a patient's."""
    found = re.search(r"(\.nii)?\.[a-z][a-z0-9]{0,4}$", name)
    return found.group() if found else "without a suffix"
