"""How small a pruned net is to be, and the search for what gets it there."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import nn

from medlite.export.layer_costs import LayerCost, count_layers, count_parameters, total
from medlite.types import CompressionContext

TARGETS = ("ratio", "macs", "params", "latency")
"""what `ratio` is a share of: channels, multiply-adds, parameters, or time on the runtime"""

MOST_HALVINGS = 20
"""of the interval in which the share of channels is searched: a millionth of them"""

MOST_TIMED = 8
"""nets that a search times; each is exported for it"""


@dataclass(frozen=True)
class Found:
    """A share of channels, the share of the target that it leaves, and nets that were tried."""

    share_left: float
    reached: float
    num_tries: int


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A measure of nets, and what it is of the whole one.

    what: in words. where: likewise, what it is measured on. show: a value in words. is_exact:
    False where only the trained net's true measure tells whether the goal is out of reach.
    most_tries: nets that a search may measure, None for any number.
    """

    target: str
    measure: Callable[[nn.Module], float]
    whole: float
    what: str
    show: Callable[[float], str]
    where: str = ""
    is_exact: bool = True
    most_tries: int | None = None

    def share(self, net: nn.Module) -> float:
        """What a net has of what the whole one has."""
        return self.measure(net) / self.whole

    def describe(self, found: Found, left: float) -> str:
        """What was asked for and what was reached, for the card."""
        missed = "" if found.reached <= left else "not reached: "
        return (
            f"{missed}at most {left:.1%} of {self.show(self.whole)} was asked for, "
            f"{found.reached:.1%} is left ({self.show(found.reached * self.whole)}){self.where}, "
            f"after {found.num_tries} tries"
        )


def goal_of(target: str, net: nn.Module, context: CompressionContext) -> Goal | None:
    """The goal of a target for a net; None for "ratio", which needs no measure.

    A plan on fresh weights times nothing and takes multiply-adds in the place of latency.
    """
    shape = context.spec.input_shape
    if target == "ratio":
        return None
    if target == "params":
        return Goal(
            target=target,
            measure=count_parameters,
            whole=count_parameters(net),
            what="parameters",
            show="{:,.0f} parameters".format,
        )
    if target == "macs" or context.latency_ms is None:
        return Goal(
            target=target,
            measure=lambda some: size_of(some, shape).macs,
            whole=size_of(net, shape).macs,
            what="multiply-adds",
            show=lambda macs: f"{macs / 1e6:,.1f} million multiply-adds",
            where="" if target == "macs" else ", in the place of latency, which no plan measures",
            is_exact=target == "macs",
        )
    meter = context.latency_ms
    return Goal(
        target=target,
        measure=meter,
        whole=meter(net),
        what="latency",
        show="{:.3g} ms".format,
        where=f" on {meter.where}",
        is_exact=False,
        most_tries=MOST_TIMED,
    )


def search(
    reached: Callable[[float], tuple[Hashable, Callable[[], float]]],
    wanted: float,
    *,
    least: float,
    most_tries: int | None = None,
) -> Found:
    """The largest share of channels that leaves at most `wanted` of the target, by bisection.

    Args:
        reached: share of channels -> (what the net would look like, what gives the share of the
            target that is left). Nets that look alike are tried once.
        wanted: share of the target that may be left.
        least: share of channels that is left at least; taken where even that leaves too much.
        most_tries: ends the search after so many nets.
    """
    tried: dict[Hashable, float] = {}

    def left_at(share: float) -> float:
        look, measure = reached(share)
        if look not in tried:
            tried[look] = measure()
        return tried[look]

    low, high, best = least, 1.0, left_at(least)
    if best > wanted:
        return Found(least, best, len(tried))
    for _ in range(MOST_HALVINGS):
        if most_tries is not None and len(tried) >= most_tries:
            break
        middle = (low + high) / 2
        left = left_at(middle)
        if left <= wanted:
            low, best = middle, left
        else:
            high = middle
    return Found(low, best, len(tried))


def size_of(net: nn.Module, input_shape: tuple[int, ...]) -> LayerCost:
    """What a net costs in the form that is deployed, as the card counts it.

    Args:
        net: in evaluation mode.
        input_shape: (C, H, W[, D]) of an image.
    """
    return total(count_layers(net, input_shape))


def describe_size(net: nn.Module, input_shape: tuple[int, ...]) -> str:
    """Parameters and multiply-adds in words."""
    size = size_of(net, input_shape)
    return f"{size.params:,} parameters and {size.macs / 1e6:,.1f} million multiply-adds an image"
