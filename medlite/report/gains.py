"""How much smaller and faster a net is than another one, on each runtime."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from medlite.report.lookup import Lookup, number
from medlite.types import Measurement

LEAST_SAVING = 0.99
"""of the bytes before, for a file to count as smaller"""

Gain = dict[str, Any]
"""speedup (a ratio), interval (its ends), size_ratio (bytes after over before), and why one of
them is None: reason"""
Gains = dict[str, Gain]
"""runtime -> gain"""


def gains_of(
    measurements: Iterable[Measurement], runtimes: Iterable[str], *, reason: str = ""
) -> Gains:
    """What a benchmark of two nets says, "baseline" being the one before.

    Args:
        measurements: of both.
        runtimes: by name.
        reason: why there are no measurements.
    """
    found = Lookup(measurements)
    return {runtime: _gain(found, runtime, reason) for runtime in runtimes}


def _gain(found: Lookup, runtime: str, reason: str) -> Gain:
    speedup = found.get(f"speedup/{runtime}/ratio")
    sizes = [found.of("size", f"{prefix}{runtime}", "disk_kib") for prefix in ("", "baseline/")]
    after, before = (size.value if size is not None else None for size in sizes)
    is_timed = speedup is not None and speedup.value is not None
    return {
        "speedup": speedup.value if speedup is not None else None,
        "interval": list(speedup.spread) if speedup is not None and speedup.spread else None,
        "size_ratio": after / before if after is not None and before else None,
        "reason": "" if is_timed else reason or (speedup.note if speedup else "not timed"),
    }


def describe_gain(whole: Gains, by_step: Mapping[str, Gains]) -> str:
    """Where a recipe made a net neither smaller nor faster, or slower; and which steps did not.

    Faster or slower means that the whole interval of the speed-up lies on one side of 1; smaller,
    at least 1 % fewer bytes on disk: files of one net differ by the lengths of names in them.

    Args:
        whole: of the deployed net over the uncompressed one.
        by_step: of each step over what came into it.
    """
    lost, slower = _lost(whole), _slower(whole)
    parts = [
        *([f"no gain on this hardware: {', '.join(lost)}"] if lost else []),
        *([f"slower than before on {', '.join(slower)}"] if slower else []),
    ]
    for step, gains in by_step.items() if len(by_step) > 1 else ():
        lost, slower = _lost(gains), _slower(gains)
        parts += [f"neither smaller nor faster by {step} on {', '.join(lost)}"] if lost else []
        parts += [f"slower by {step} on {', '.join(slower)}"] if slower else []
    return "; ".join(parts)


def _lost(gains: Gains) -> list[str]:
    return [runtime for runtime, gain in gains.items() if is_lost(gain)]


def _slower(gains: Gains) -> list[str]:
    """Of the others, which are smaller."""
    return [runtime for runtime, gain in gains.items() if _ends(gain)[1] < 1 and not is_lost(gain)]


def is_lost(gain: Gain) -> bool:
    """Whether a net was measured and is neither smaller nor faster."""
    if gain["size_ratio"] is None:
        return False
    return _ends(gain)[0] <= 1 and gain["size_ratio"] > LEAST_SAVING


def in_words(gain: Gain) -> str:
    """For tables.

    >>> in_words({"speedup": 1.5, "interval": [1.4, 1.6], "size_ratio": 0.25, "reason": ""})
    '1.50 (1.40 to 1.60) times as fast, 0.250 of the size'
    """
    if gain["speedup"] is None:
        return f"not timed: {gain['reason']}"
    ends = f" ({' to '.join(map(number, gain['interval']))})" if gain["interval"] else ""
    size = "" if gain["size_ratio"] is None else f", {number(gain['size_ratio'])} of the size"
    return f"{number(gain['speedup'])}{ends} times as fast{size}"


def _ends(gain: Gain) -> tuple[float, float]:
    """Of the speed-up's interval; NaN where there is none."""
    if gain["speedup"] is None:
        return math.nan, math.nan
    low, high = gain["interval"] or (gain["speedup"], gain["speedup"])
    return low, high
