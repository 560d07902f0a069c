"""Stochastic depth: residual branches that are left out at random while training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382, for whole samples.

    What is kept is scaled up, so that the expectation stays; the identity in evaluation mode.

    Args:
        rate: probability that the branch of a sample is dropped.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(branch.shape[:1], device=branch.device) >= self.rate
        scale = kept.to(branch.dtype) / (1 - self.rate)
        return branch * scale.view(-1, *[1] * (branch.ndim - 1))


def rising_rates(last: float, depths: tuple[int, ...]) -> Iterator[tuple[float, ...]]:
    """For each stage the rates of its blocks, from 0 at the first block to `last` (section 3).

    >>> list(rising_rates(0.2, (1, 2)))
    [(0.0,), (0.1, 0.2)]
    """
    step = last / max(sum(depths) - 1, 1)
    first = 0
    for depth in depths:
        yield tuple(step * index for index in range(first, first + depth))
        first += depth
