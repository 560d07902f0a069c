"""What so many patients can tell at all, whatever a bootstrap of them says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from medlite.metrics.intervals import clopper_pearson_interval
from medlite.safety.statistics import PairedLoss, tango_interval, tango_score

if TYPE_CHECKING:
    from torch import Tensor

ONE_SIDED_LEVEL = 0.025
MIN_GROUPS = 20
"""percentile intervals of fewer groups are too narrow to pass anything"""
MOST_GROUPS = 10**7
"""beyond which a number of patients that would settle something says nothing"""


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """The least that so many groups can tell, whatever the bootstrap says.

    num_groups: groups that the score rests on. group_kind: what they are, in words.
    is_proportion: each group is a yes or no (found or missed). The interval of its loss is
    then the widest of the bootstrap's, Tango's for paired proportions, and at its upper end the
    exact binomial one (none lost of n still leaves 1 - 0.025^(1/n), the "rule of three"). For
    other scores, fewer than MIN_GROUPS groups never pass, and all of them fall to one side by
    chance with 0.5^n.
    """

    num_groups: int
    group_kind: str
    is_proportion: bool

    def interval_of(self, paired: PairedLoss) -> tuple[float, float] | None:
        """95 %, of the loss; None where the bootstrap has none."""
        bootstrapped = paired.interval
        if bootstrapped is None or not self.is_proportion:
            return bootstrapped
        exact = interval_of_proportion(*paired.discordant(self.num_groups), self.num_groups)
        return min(bootstrapped[0], exact[0]), max(bootstrapped[1], exact[1])

    def groups_to_pass(self, margin: float) -> int:
        """How many groups it takes before anything can pass: with none lost."""
        if not self.is_proportion:
            return MIN_GROUPS
        return least_number(lambda n: interval_of_proportion(0, 0, n)[1] < margin)

    def groups_to_settle(
        self, paired: PairedLoss, interval: tuple[float, float], margin: float
    ) -> int:
        """How many groups would put the loss on its side of the margin if it stayed as it is.

        For proportions by their own intervals; for other scores by the root of n, with which the
        width of the bootstrap's interval shrinks.
        """
        below = paired.loss < margin
        if self.is_proportion:
            lost, gained = (part / self.num_groups for part in paired.discordant(self.num_groups))

            def settles(n: int) -> bool:
                low, high = interval_of_proportion(lost * n, gained * n, n)
                return high < margin if below else low > margin

            return least_number(settles)
        nearer_end = interval[1] if below else interval[0]
        growth = ((nearer_end - paired.loss) / (margin - paired.loss)) ** 2
        needed = min(math.ceil(self.num_groups * growth), MOST_GROUPS)
        return max(needed, MIN_GROUPS) if below else needed

    def p_value(self, paired: PairedLoss, margin: float) -> float:
        """One-sided p value of "the loss is at most its margin"."""
        known = paired.samples[np.isfinite(paired.samples)]
        if not len(known) or not self.num_groups:
            return 1.0
        by_bootstrap = (1 + np.count_nonzero(known <= margin)) / (1 + len(known))
        if not self.is_proportion:
            return max(by_bootstrap, 0.5**self.num_groups)
        # What n lost of n come to by chance, where as many could have been gained.
        by_chance = ((1 + margin) / 2) ** self.num_groups
        score = tango_score(*paired.discordant(self.num_groups), self.num_groups, margin)
        return max(by_bootstrap, by_chance, 1 - NormalDist().cdf(score))


def interval_of_proportion(
    num_lost: float, num_gained: float, num_pairs: int
) -> tuple[float, float]:
    """95 %, of the net loss of paired yes-or-no outcomes: Tango's, its upper end at least exact.

    Between them the chance to pass at a loss of the margin stays below 2.7 % where
    tests/safety/test_resolution.py goes through all outcomes (the margins of conf/safety, several
    rates of gain).
    """
    low, high = tango_interval(num_lost, num_gained, num_pairs)
    net = min(max(num_lost - num_gained, 0.0), num_pairs)
    return low, max(high, clopper_pearson_interval(net, num_pairs)[1])


def least_number(is_enough: Callable[[int], bool]) -> int:
    """The least n from 1 up for which `is_enough`, which stays true from there on; by bisection.

    >>> least_number(lambda n: n * n > 1000)
    32
    """
    high = 1
    while high < MOST_GROUPS and not is_enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def groups_behind_area(counts: Tensor, position: int) -> int:
    """The groups with a class, or those without it where they are fewer.

    Args:
        counts: (G, C, 4), see `medlite.metrics.counts`.
        position: of the class.
    """
    has_class = (counts[:, position, 0] + counts[:, position, 2] > 0).sum()
    has_others = (counts[:, position, 1] + counts[:, position, 3] > 0).sum()
    return int(min(has_class, has_others))


def groups_behind_metric(counts: Tensor, *, task: str) -> int:
    """The fewest groups that one term of the task metric rests on: a mean is as sure as they are.

    An area under the ROC curve rests on the groups with a class and on those without it, a Dice
    on those with a structure. Classes that the metric leaves out do not count.

    Args:
        counts: (G, C, 4).
        task: "classification" or "segmentation".
    """
    if task == "segmentation":
        behind = (counts[:, 1:, 0] + counts[:, 1:, 2] > 0).sum(0).tolist()
    else:
        behind = [groups_behind_area(counts, position) for position in range(counts.shape[1])]
    return min((number for number in behind if number), default=0)
