"""What each stage of a run left, as a picture and as tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from medlite.report.gains import in_words, is_lost
from medlite.report.lookup import number
from medlite.report.svg import INK, MUTED, picture
from medlite.report.tables import chip, plain, table

BOX_WIDTH, BOX_HEIGHT, GAP, MARGIN = 168, 104, 76, 6

Row = Mapping[str, Any]


def lineage_diagram(lineage: Sequence[Row], metric: str) -> str:
    """A box a stage, with what it left; on the arrows, by how much weights and score changed."""
    width = len(lineage) * (BOX_WIDTH + GAP) - GAP + 2 * MARGIN
    height = BOX_HEIGHT + 2 * MARGIN
    shapes = [_box(position, row, metric) for position, row in enumerate(lineage)]
    shapes += [
        _arrow(position, before, after, metric)
        for position, (before, after) in enumerate(itertools.pairwise(lineage))
    ]
    names = ", ".join(row["stage"] for row in lineage)
    return picture(width, height, f"lineage: {names}", shapes, style=f"max-width:{width}px")


def lineage_table(lineage: Sequence[Row], metric: str) -> str:
    """What each stage left, with the class that it hurt most."""
    headings = ["stage", "largest loss of a class", "parameters", "GMACs", "weights KiB", metric]
    headings += ["ECE", "NLL", "seconds", "sha256"]
    rows = []
    for before, row in zip([None, *lineage], lineage, strict=False):
        scores = row["scores"]
        rows.append(
            [
                escape(row["stage"]),
                plain(worst_loss(before, row)),
                plain(row["params"]),
                plain(row["macs"] / 1e9),
                plain(row["weight_bytes"] / 1024),
                *(plain(scores.get(name)) for name in (metric, "ece", "nll")),
                plain(row["seconds"]),
                f"<code>{row['sha256'][:12]}</code>",
            ]
        )
    return table(headings, rows, num_words=2)


def gains_table(lineage: Sequence[Row]) -> str:
    """What each step brought on each runtime beside what came into it; "" where it is unknown."""
    rows = [
        [
            escape(row["stage"]),
            escape(runtime),
            chip("no gain") if is_lost(gain) else "",
            escape(in_words(gain)),
        ]
        for row in lineage
        for runtime, gain in row["gains"].items()
    ]
    headings = ["step", "runtime", "", "beside what came into it, queries in turns"]
    return table(headings, rows, num_words=4) if rows else ""


def class_lineage_table(lineage: Sequence[Row]) -> str:
    """The sensitivity of every class after each stage, and what the stage did to it."""
    names = [name for name in lineage[0]["scores"] if name.startswith("sensitivity/")]
    headings = ["class", *(row["stage"] for row in lineage)]
    rows = []
    for name in names:
        values = [row["scores"].get(name) for row in lineage]
        changes = [_change(*pair) for pair in itertools.pairwise(values)]
        cells = [plain(value) + text for value, text in zip(values, ["", *changes], strict=True)]
        rows.append([escape(name.removeprefix("sensitivity/")), *cells])
    return table(headings, rows) if rows else ""


def worst_loss(before: Row | None, after: Row) -> str:
    """The class whose sensitivity fell most in a stage; "" where none fell.

    >>> worst_loss({"scores": {"sensitivity/a": 0.9}}, {"scores": {"sensitivity/a": 0.7}})
    'a: sensitivity -0.200'
    """
    earlier = before["scores"] if before else {}
    losses = {
        name: earlier[name] - value
        for name, value in after["scores"].items()
        if name.startswith("sensitivity/") and None not in (value, earlier.get(name))
    }
    worst = max(losses, key=losses.__getitem__, default="")
    if not worst or losses[worst] <= 0:
        return ""
    return f"{worst.removeprefix('sensitivity/')}: sensitivity -{losses[worst]:.3f}"


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return f'<span class="spread">{after - before:+.3f}</span>'


def _box(position: int, row: Row, metric: str) -> str:
    left = MARGIN + position * (BOX_WIDTH + GAP)
    score = row["scores"].get(metric)
    lines = [
        f"{row['params']:,} parameters",
        f"{number(row['macs'] / 1e9)} GMACs",
        f"{number(row['weight_bytes'] / 1024)} KiB of weights",
        f"{metric} {'-' if score is None else number(score)}",
    ]
    frame = (
        f'<rect x="{left}" y="{MARGIN}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
        f'fill="none" stroke="{MUTED}"/>'
    )
    title = _text(left + 12, MARGIN + 22, row["stage"], INK, 'font-weight="600"')
    words = [
        _text(left + 12, MARGIN + 42 + 17 * line, text, MUTED) for line, text in enumerate(lines)
    ]
    return frame + title + "".join(words)


def _arrow(position: int, before: Row, after: Row, metric: str) -> str:
    start = MARGIN + position * (BOX_WIDTH + GAP) + BOX_WIDTH
    end, middle = start + GAP, MARGIN + BOX_HEIGHT / 2
    line = (
        f'<line x1="{start + 4}" y1="{middle}" x2="{end - 10}" y2="{middle}" stroke="{INK}"/>'
        f'<path d="M {end - 4} {middle} l -8 -4 l 0 8 z" fill="{INK}"/>'
    )
    share = after["weight_bytes"] / before["weight_bytes"]
    words = [(middle - 8, f"x{share:.2f} KiB")]
    scores = [row["scores"].get(metric) for row in (before, after)]
    if None not in scores:
        words.append((middle + 18, f"{scores[1] - scores[0]:+.3f}"))
    centre = (start + end) / 2
    return line + "".join(
        _text(centre, y, text, MUTED, 'text-anchor="middle"') for y, text in words
    )


def _text(x: float, y: float, words: str, colour: str, style: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}" {style}>{escape(words)}</text>'
