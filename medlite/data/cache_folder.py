"""Where files that medlite makes or downloads are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from medlite.errors import DataError


def cache_folder(given: str | Path | None = None) -> Path:
    """`given`, or `$XDG_CACHE_HOME/medlite`, or `~/.cache/medlite`; made where it is missing.

    Raises:
        DataError: it cannot be made.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(given).expanduser() if given else Path(base) / "medlite"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"no cache folder {folder} ({error.strerror}); set XDG_CACHE_HOME to another"
        raise DataError(message) from error
    return folder
