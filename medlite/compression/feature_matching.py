"""How far feature maps of a student are from those of a teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.compression.feature_maps import pool_to, smaller_grid
from medlite.errors import MedliteError


class FeatureMatching(nn.Module):
    """Squared distance between normalised feature maps of a student and a teacher.

    The student's maps go through trained 1x1 convolutions to the teacher's channels, both to the
    coarser grid of the two by average pooling, and to unit length at every pixel: the distance
    is 2 - 2 cos, in [0, 4]. FitNets (Romero et al., arXiv:1412.6550) with the normalisation of
    attention transfer (Zagoruyko and Komodakis, arXiv:1612.03928).

    Args:
        student: maps (B, C, H, W[, D]) by path, for their channels.
        teacher: the teacher's, by path.
        pairs: student path -> teacher path.
    """

    def __init__(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        pairs: Mapping[str, str],
    ) -> None:
        super().__init__()
        self._pairs = tuple(pairs.items())
        self.adapters = nn.ModuleList(
            _adapter(student[path], teacher[teacher_path]) for path, teacher_path in self._pairs
        )

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The mean distance over pairs, images and pixels."""
        distances = [
            _distance(adapter(student[path]), teacher[teacher_path])
            for adapter, (path, teacher_path) in zip(self.adapters, self._pairs, strict=True)
        ]
        return torch.stack(distances).mean()


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    grid = smaller_grid(student, teacher)
    maps = (pool_to(features.float(), grid) for features in (student, teacher))
    of_student, of_teacher = (F.normalize(features, dim=1) for features in maps)
    return (of_student - of_teacher).square().sum(1).mean()


def require_maps(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], pairs: Mapping[str, str]
) -> None:
    """Refuse modules that give no maps.

    Raises:
        MedliteError: a module gives something else than (B, C, H, W[, D]).
    """
    for path, teacher_path in pairs.items():
        for features in (student[path], teacher[teacher_path]):
            if not isinstance(features, Tensor) or features.ndim not in (4, 5):
                message = (
                    "distill.features: a named module gives "
                    f"{tuple(getattr(features, 'shape', ()))} instead of maps (B, C, H, W[, D])"
                )
                raise MedliteError(message)


def _adapter(student: Tensor, teacher: Tensor) -> nn.Module:
    convolution = nn.Conv2d if student.ndim == 4 else nn.Conv3d
    return convolution(student.shape[1], teacher.shape[1], kernel_size=1)
