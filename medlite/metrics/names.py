"""Class names as parts of measurement keys."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


def class_keys(class_names: Sequence[str]) -> tuple[str, ...]:
    """Lower-case ASCII words joined by `_`, different from each other.

    >>> class_keys(["No finding", "Grade 3/4", "Grade 3-4"])
    ('no_finding', 'grade_3_4', 'grade_3_4_2')
    """
    keys: list[str] = []
    for position, name in enumerate(class_names):
        ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        key = re.sub(r"[^a-z0-9]+", "_", ascii_name.lower()).strip("_") or f"class_{position}"
        keys.append(f"{key}_{position}" if key in keys else key)
    return tuple(keys)
