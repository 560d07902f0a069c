"""The frame of every page that medlite writes: one file, its style inside, no scripts."""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE_PATH = Path(__file__).with_name("page.css")


def page(title: str, body: str) -> str:
    """A whole document around `body`, which is HTML."""
    style = STYLE_PATH.read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )
