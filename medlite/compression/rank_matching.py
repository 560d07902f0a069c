"""Which places of an image a teacher finds important, taught by their order alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.compression.feature_maps import pool_to, smaller_grid

_LEAST_IMPORTANCE = 1e-12
"""keeps the logarithm finite where a map is all zero"""


class RankMatching(nn.Module):
    """The student's places are to be as important, in order, as the teacher's most important.

    Inspired by the token importance ranking of RSKD (Liang et al., Knowledge-Based Systems 293,
    2024, 111664, abstract), whose text and code are not public: this is our own form, not that
    method. The importance of a place is the mean square of its features. Of the teacher's `top`
    places every two are a pair, and the loss is the pairwise logistic one (Burges et al.,
    "Learning to Rank using Gradient Descent", ICML 2005, section 3) of the logarithms of the
    student's importances: log(1 + b / a) for a student that gives a to the place that should be
    ahead and b to the other. Scale and number of channels do not matter, so it joins any two
    kinds of net without adapters.

    Args:
        pairs: student path -> teacher path, of maps (B, C, H, W[, D]).
        top: places of an image that are ranked, at most all of the coarser grid.
    """

    def __init__(self, pairs: Mapping[str, str], *, top: int) -> None:
        super().__init__()
        self._pairs = tuple(pairs.items())
        self._top = top

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The mean over pairs of maps, images and pairs of places."""
        losses = [ranking_loss(student[p], teacher[q], top=self._top) for p, q in self._pairs]
        return torch.stack(losses).mean()


def ranking_loss(student: Tensor, teacher: Tensor, *, top: int) -> Tensor:
    """Pairwise logistic loss on the order of the teacher's `top` places.

    Args:
        student: (B, C, H, W[, D]).
        teacher: likewise, of any channels and grid.
        top: places that are ranked.
    """
    grid = smaller_grid(student, teacher)
    taught, wanted = (_importance(features, grid) for features in (student, teacher))
    order = wanted.topk(min(top, wanted.shape[1]), dim=1)
    log_taught = taught.clamp_min(_LEAST_IMPORTANCE).log().gather(1, order.indices)
    is_pair = order.values.unsqueeze(2) > order.values.unsqueeze(1)
    ahead = log_taught.unsqueeze(2) - log_taught.unsqueeze(1)
    return (F.softplus(-ahead) * is_pair).sum() / is_pair.sum().clamp_min(1)


def _importance(features: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, C, H, W[, D]) -> (B, places of the grid)."""
    return pool_to(features.float().square().mean(1, keepdim=True), grid).flatten(1)
