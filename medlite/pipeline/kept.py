"""Small results in the run directory, under the key of what made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medlite.tasks.checkpoints import save_text


def read_kept(path: Path, key: str) -> dict[str, Any] | None:
    """What an earlier run left under the same key."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return content["value"] if content["key"] == key else None


def write_kept(path: Path, key: str, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_text(json.dumps({"key": key, "value": value}), path)
