"""What feature maps of student and teacher add to a loss, while both nets are listened to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medlite.compression.feature_maps import tapped
from medlite.compression.feature_matching import FeatureMatching, require_maps
from medlite.compression.rank_matching import RankMatching


class MapWeights(NamedTuple):
    """Of the terms; 0 leaves one out."""

    features: float
    ranks: float
    rank_top: int


class MapTerms(NamedTuple):
    """The sum of the weighted terms for the maps of the last forward passes."""

    total: Callable[[], Tensor]
    adapters: nn.Module | None
    """to be trained beside the student"""


@contextmanager
def map_terms(
    student: nn.Module,
    teacher: nn.Module,
    pairs: Mapping[str, str],
    *,
    images: Tensor,
    weights: MapWeights,
) -> Iterator[MapTerms]:
    """Listen to the modules of `pairs` while the context lasts.

    Args:
        student: the net that learns.
        teacher: the net that it learns from.
        pairs: student path -> teacher path; empty for terms of 0.
        images: (B, C, H, W[, D]), to find the shapes of the maps.
        weights: of the terms.

    Raises:
        MedliteError: there is no such module, or it gives no map.
    """
    size, option = images.shape[2:], "distill.features"
    with (
        tapped(student, list(pairs), option, size) as maps,
        tapped(teacher, list(pairs.values()), option, size) as taught,
    ):
        if pairs:
            with torch.no_grad():
                student(images)
                teacher(images)
            require_maps(maps, taught, pairs)
        matching = FeatureMatching(maps, taught, pairs) if weights.features else None
        ranking = RankMatching(pairs, top=weights.rank_top) if weights.ranks else None

        def total() -> Tensor:
            value = torch.zeros(())
            if matching is not None:
                value = value + weights.features * matching(maps, taught)
            if ranking is not None:
                value = value + weights.ranks * ranking(maps, taught)
            return value

        yield MapTerms(total, matching)
