"""The fewest layers to keep in float, in a given order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """What rounding one layer alone costs.

    Args:
        name: the layer's path.
        noise_ratio: power of the error of the logits over their power.
        loss: of the clinical objective; negative where it got better.
    """

    name: str
    noise_ratio: float
    loss: float


def most_sensitive_first(
    layers: Sequence[LayerSensitivity], *, order_by: str
) -> list[LayerSensitivity]:
    """By "noise" (ties: by loss) or by "objective" (ties: by noise), the worst first."""

    def cost(layer: LayerSensitivity) -> tuple[float, float]:
        both = (layer.noise_ratio, layer.loss)
        return both if order_by == "noise" else both[::-1]

    return sorted(layers, key=cost, reverse=True)


def counts_to_verify(loss_of: Callable[[int], float], *, bound: int, margin: float) -> list[int]:
    """How many layers to keep in float, as far as a simulation can tell.

    Found by bisection, as in Pandey et al., arXiv:2302.05397, which takes for granted that one
    more layer in float does no harm. Where not even `bound` layers suffice, every count is looked
    at, and the one of least loss is all there is.

    Args:
        loss_of: a number of layers in float -> loss of the objective.
        bound: the largest number.
        margin: the largest loss that is allowed.

    Returns:
        The least sufficient count and those after it, to be verified in this order.

    >>> counts_to_verify(lambda count: 0.05 - 0.01 * count, bound=8, margin=0.025)
    [3, 4, 5, 6, 7, 8]
    >>> counts_to_verify(lambda count: abs(count - 2) + 1, bound=4, margin=0.1)
    [2]
    """
    if loss_of(bound) > margin:
        return [min(range(bound + 1), key=loss_of)]
    low, high = -1, bound
    while high - low > 1:
        middle = (low + high) // 2
        if loss_of(middle) > margin:
            low = middle
        else:
            high = middle
    return list(range(high, bound + 1))
