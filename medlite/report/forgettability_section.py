"""Forgettability as a table and a chart: a line a class, redder the rarer it is."""

from __future__ import annotations

from medlite.report.forgettability import LARGEST_DROP, RISING, ClassCurve, Forgetting, Level
from medlite.report.lookup import number
from medlite.report.section import Section
from medlite.report.svg import MUTED, Chart

LINE_HEIGHT = 15
MIN_TOP = 1.2
"""of the chart's axis, so that the line of no loss has room above it"""
ONE_SEED = (
    "No ranking of classes or levels: one seed says nothing of others. The same command with "
    "seeds=5 gives intervals."
)


def forgettability_section(found: Forgetting) -> Section:
    """What each class keeps of its score at each level, and where it is forgotten."""
    share = "pixels" if found.score == "Dice" else "images"
    return Section(
        title=(
            f"Forgettability: {found.dataset}, {found.model}, {found.compression} on "
            f"{found.runtime}, {found.score} relative to the uncompressed model"
        ),
        headings=(
            "class",
            f"training {share}",
            f"{found.score} uncompressed",
            *(f"{name_of(found)} {strength:g}" for strength in found.strengths),
            "forgotten at",
        ),
        rows=tuple(_row(curve, found) for curve in found.classes),
        remarks=_remarks(found),
        chart=forgettability_chart(found),
    )


def name_of(found: Forgetting) -> str:
    """The swept option without its step."""
    return found.key.rpartition(".")[2]


def forgettability_chart(found: Forgetting) -> str:
    """Relative score against strength; "" without a point to draw.

    Intervals are upright lines that end with the axis: those of two seeds are wider than all means.
    """
    drawn = [curve for curve in found.classes if curve.levels]
    if not drawn:
        return ""
    highest = max(level.relative for curve in drawn for level in curve.levels)
    key = found.key.removeprefix("compression.")
    direction = "higher" if RISING[key] else "lower"
    chart = Chart(
        title=f"{found.score} of each class against {found.key}",
        x_range=(min(found.strengths), max(found.strengths)),
        y_range=(0, max(MIN_TOP, 1.1 * highest)),
        width=860,
        height=max(340, 80 + LINE_HEIGHT * len(drawn)),
        right=190,
    )
    chart.axes(
        x_label=f"{found.key} ({direction}: more compressed)", y_label=f"relative {found.score}"
    )
    limit = 1 - LARGEST_DROP
    chart.line([(strength, limit) for strength in found.strengths], MUTED, is_dashed=True)
    for position, curve in enumerate(drawn):
        _draw(chart, curve, colour_of(position, len(drawn)), chart.top + LINE_HEIGHT * position)
    return chart.render()


def colour_of(position: int, count: int) -> str:
    """From blue for the most frequent class to red for the rarest.

    >>> colour_of(0, 3), colour_of(2, 3)
    ('hsl(220 55% 45%)', 'hsl(0 55% 45%)')
    """
    hue = 220 * (1 - position / max(count - 1, 1))
    return f"hsl({hue:.0f} 55% 45%)"


def _draw(chart: Chart, curve: ClassCurve, colour: str, key_y: float) -> None:
    chart.line([(level.strength, level.relative) for level in curve.levels], colour)
    for level in curve.levels:
        chart.dot(level.strength, level.relative, colour)
        if level.half_width:
            chart.line([(level.strength, end) for end in _interval(level, chart)], colour)
    x = chart.width - chart.right + 14
    words = f"{curve.class_name} ({curve.prevalence:.2%})"
    chart.text(x, key_y + 4, words, colour=colour)


def _interval(level: Level, chart: Chart) -> tuple[float, float]:
    width, (low, high) = level.half_width or 0.0, chart.y_range
    return max(level.relative - width, low), min(level.relative + width, high)


def _row(curve: ClassCurve, found: Forgetting) -> tuple[str, ...]:
    levels = {level.strength: level for level in curve.levels}
    return (
        curve.class_name,
        f"{curve.prevalence:.2%}",
        "-" if curve.baseline is None else number(curve.baseline),
        *(_level_words(levels.get(strength)) for strength in found.strengths),
        _verdict(curve, found),
    )


def _level_words(level: Level | None) -> str:
    if level is None:
        return "-"
    spread = "" if level.half_width is None else f" \u00b1 {number(level.half_width)}"
    return f"{number(level.relative)}{spread}"


def _verdict(curve: ClassCurve, found: Forgetting) -> str:
    if curve.baseline is None:
        return "not in the test split"
    if not curve.levels:
        return "uncompressed no better than chance"
    chance = curve.num_seeds_at_chance
    aside = f" (seeds at chance left out: {chance})" if chance else ""
    if curve.forgotten_at is None:
        return f"not up to {found.strengths[-1]:g}{aside}"
    return f"{curve.forgotten_at:g}{aside}"


def _remarks(found: Forgetting) -> tuple[str, ...]:
    nums = {level.num_seeds for curve in found.classes for level in curve.levels}
    remarks = [
        "Forgotten at: the mildest level at which the mean has fallen by over "
        f"{100 * LARGEST_DROP:.0f} % (Holste et al., arXiv:2308.09180)."
    ]
    if nums and max(nums) > 1:
        span = str(max(nums)) if len(nums) == 1 else f"{min(nums)} to {max(nums)}"
        remarks.append(f"Means over {span} seeds \u00b1 half of their 95 % interval (Student's t).")
    if 1 in nums:
        remarks.append(ONE_SEED)
    return tuple(remarks)
