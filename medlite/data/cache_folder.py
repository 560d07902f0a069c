"""Where files that medlite makes or downloads are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(given: str | Path | None = None) -> Path:
    """`given`, or `$XDG_CACHE_HOME/medlite`, or `~/.cache/medlite`; made where it is missing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(given).expanduser() if given else Path(base) / "medlite"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
