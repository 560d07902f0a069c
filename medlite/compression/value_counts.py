"""Percentiles of more values than can be kept."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_CODES = 1 << 16


class ValueCounts:
    """Counts values, each rounded to bfloat16, which has few enough codes to count one by one.

    A percentile is thus right to within half a step of bfloat16 (0.4 % of its value), however far
    away an outlier lies: bins of one width, laid from the least to the largest value, would all
    be too wide as soon as there is one.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(0, dtype=torch.int64)

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Count all of `values`, of any shape."""
        codes = values.detach().flatten().bfloat16().view(torch.int16).int() + NUM_CODES // 2
        counts = torch.bincount(codes, minlength=NUM_CODES).cpu()
        self._counts = counts if self._counts.numel() == 0 else self._counts + counts

    def quantile(self, share: float) -> Tensor:
        """The least value that a `share` of all values does not exceed, 0-dimensional."""
        seen = self._counts.nonzero()[:, 0]
        values = (seen - NUM_CODES // 2).to(torch.int16).view(torch.bfloat16).float()
        order = values.argsort()
        num_up_to = self._counts[seen][order].cumsum(0)
        wanted = share * float(num_up_to[-1])
        index = int((num_up_to.double() < wanted).sum().clamp(max=len(order) - 1))
        return values[order][index]
