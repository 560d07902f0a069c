"""A small chart as an inline SVG picture: axes, lines, bars, dots. No scripts, no fonts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

INK, MUTED, GRID = "#1a2230", "#64707f", "#e3e7ec"
FONT_PX = 11.5


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values between low and high.

    >>> nice_ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(position * step, 12) for position in range(first, last + 1)]


def picture(width: int, height: int, title: str, shapes: Iterable[str], style: str = "") -> str:
    """An SVG element; its text has a size of its own, which not every renderer takes from CSS."""
    words = f'role="img" aria-label="{escape(title)}" font-size="{FONT_PX}"'
    styled = f' style="{style}"' if style else ""
    return f'<svg viewBox="0 0 {width} {height}" {words}{styled}>{"".join(shapes)}</svg>'


class Chart:
    """Collects shapes in data coordinates and gives the SVG text."""

    def __init__(
        self,
        *,
        title: str,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        width: int = 460,
        height: int = 260,
        left: int = 48,
        right: int = 14,
    ) -> None:
        self.title = title
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = left, right, 30, 40
        self.x_range, self.y_range = widened(x_range), widened(y_range)
        self.shapes: list[str] = []

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self.x_range
        room = self.width - self.left - self.right
        return self.left + (value - low) / (high - low) * room

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.y_range
        room = self.height - self.top - self.bottom
        return self.height - self.bottom - (value - low) / (high - low) * room

    def axes(
        self,
        *,
        x_label: str,
        y_label: str = "",
        has_y_ticks: bool = True,
        has_whole_x: bool = False,
    ) -> None:
        """Grid, ticks and labels; `has_whole_x` leaves out ticks between whole numbers."""
        floor = self.height - self.bottom
        for tick in nice_ticks(*self.x_range):
            if has_whole_x and tick != int(tick):
                continue
            self.text(self.x(tick), floor + 15, f"{tick:g}", anchor="middle", colour=MUTED)
            if not has_y_ticks:
                self.rule(self.x(tick), self.top, self.x(tick), floor, GRID)
        for tick in nice_ticks(*self.y_range) if has_y_ticks else ():
            self.rule(self.left, self.y(tick), self.width - self.right, self.y(tick), GRID)
            self.text(self.left - 7, self.y(tick) + 4, f"{tick:g}", anchor="end", colour=MUTED)
        self.rule(self.left, floor, self.width - self.right, floor, MUTED)
        middle = (self.left + self.width - self.right) / 2
        self.text(middle, self.height - 6, x_label, anchor="middle", colour=MUTED)
        if y_label:
            self.text(self.left, self.top - 6, y_label, colour=MUTED)

    def rule(self, x1: float, y1: float, x2: float, y2: float, colour: str) -> None:
        """A thin line in pixels."""
        self.shapes.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
        )

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "start", colour: str = INK
    ) -> None:
        """Words at pixels."""
        self.shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
            f"{escape(words)}</text>"
        )

    def line(
        self, points: Iterable[tuple[float, float]], colour: str, *, is_dashed: bool = False
    ) -> None:
        """A line through data points."""
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if is_dashed else ""
        self.shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-linejoin="round"{dash}/>'
        )

    def dot(
        self, x: float, y: float, colour: str, *, radius: float = 3, opacity: float = 1
    ) -> None:
        """A dot at a data point."""
        self.shapes.append(
            f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius:g}" '
            f'fill="{colour}" fill-opacity="{opacity:g}"/>'
        )

    def box(
        self,
        corner: tuple[float, float],
        opposite: tuple[float, float],
        colour: str,
        opacity: float,
    ) -> None:
        """A filled rectangle between two data points."""
        x1, x2 = sorted((self.x(corner[0]), self.x(opposite[0])))
        y1, y2 = sorted((self.y(corner[1]), self.y(opposite[1])))
        self.shapes.append(
            f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" '
            f'fill="{colour}" fill-opacity="{opacity:g}"/>'
        )

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Colour keys at the top right."""
        x = float(self.width - self.right)
        for label, colour in reversed(entries):
            x -= 7 * len(label)
            self.text(x, 15, label, colour=INK)
            self.shapes.append(
                f'<rect x="{x - 16:.1f}" y="9" width="11" height="4" rx="2" fill="{colour}"/>'
            )
            x -= 30

    def render(self) -> str:
        """The SVG element; the title is for screen readers."""
        return picture(self.width, self.height, self.title, self.shapes)


def widened(limits: tuple[float, float]) -> tuple[float, float]:
    """A range that is not empty."""
    low, high = limits
    if high > low:
        return low, high
    margin = abs(low) * 0.05 or 1.0
    return low - margin, high + margin
