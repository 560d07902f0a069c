"""Random changes that an image of each modality may undergo without changing its label.

MONAI transforms with few, cheap steps: small rotations, scalings and shifts for all, an
intensity change and noise where intensities vary between scanners, and only those mirrorings
that the modality really shows:

- ct, mr: none. Organs have a side, and classes such as "left kidney" change with it.
- ct_patch: every axis. A nodule's crop has no orientation of its own.
- xray: none. A mirrored heart is dextrocardia, a finding.
- ultrasound, oct: the lateral axis. Depth is physical: attenuation and shadows point down.
- fundus: the lateral axis, which turns a right eye into a left one; grades do not depend on it.
- microscopy, dermatoscopy, shape, phantom: every axis; shapes get no intensity change.
- other: none, since nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Transform,
)
from torch import Tensor

from medlite.monai_metadata import no_metadata

_ALL_AXES = (0, 1, 2)
_LATERAL = 1


@dataclass(frozen=True)
class Recipe:
    """How strongly a modality is augmented.

    Args:
        flip_axes: spatial axes (0 rows, 1 columns, 2 depth) that may be mirrored.
        max_rotation: radians, in plane and out of it.
        max_scaling: relative change of size.
        max_shift_ratio: of each side.
        intensity: relative change of contrast, and of brightness in units of the image's scale.
        noise_sd: standard deviation of added Gaussian noise.
    """

    flip_axes: tuple[int, ...] = ()
    max_rotation: float = 0.17
    max_scaling: float = 0.1
    max_shift_ratio: float = 0.06
    intensity: float = 0.1
    noise_sd: float = 0.05


RECIPES: dict[str, Recipe] = {
    "ct": Recipe(),
    "ct_patch": Recipe(flip_axes=_ALL_AXES, max_rotation=0.5),
    "mr": Recipe(intensity=0.2),
    "xray": Recipe(max_rotation=0.1),
    "ultrasound": Recipe(flip_axes=(_LATERAL,), intensity=0.2),
    "oct": Recipe(flip_axes=(_LATERAL,), max_rotation=0.1),
    "fundus": Recipe(flip_axes=(_LATERAL,), intensity=0.15),
    "microscopy": Recipe(flip_axes=_ALL_AXES, max_rotation=0.5),
    "dermatoscopy": Recipe(flip_axes=_ALL_AXES, max_rotation=0.5),
    "shape": Recipe(flip_axes=_ALL_AXES, max_rotation=0.3, intensity=0.0, noise_sd=0.0),
    "phantom": Recipe(flip_axes=_ALL_AXES),
    "other": Recipe(),
}


class Augmentation:
    """The random transforms of one modality; the same seed always makes the same change.

    Image and mask move together. Interpolation is linear for the image and nearest for the
    mask; what moves in from outside repeats the border.

    Args:
        modality: a key of `RECIPES`; others fall back to "other".
        image_size: (H, W) or (H, W, D).
    """

    def __init__(self, modality: str, image_size: Sequence[int]) -> None:
        recipe = RECIPES.get(modality, RECIPES["other"])
        self._random = np.random.RandomState()  # MONAI wants this class; reseeded per sample
        self._transform = Compose(list(_transforms(recipe, tuple(image_size))))
        for transform in self._transform.transforms:
            transform.set_random_state(state=self._random)

    def __call__(
        self, image: Tensor, mask: Tensor | None, seed: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Augment (C, H, W[, D]) float32 and, with it, (H, W[, D]) int64.

        `seed` holds non-negative integers, such as (seed, epoch, position).
        """
        self._random.seed(np.random.SeedSequence(seed).generate_state(1))
        sample = {"image": image}
        if mask is not None:
            sample["mask"] = mask[None].float()
        with no_metadata():
            changed = self._transform(sample)
        changed_mask = None if mask is None else changed["mask"][0].long()
        return changed["image"].contiguous(), changed_mask


def _transforms(recipe: Recipe, image_size: tuple[int, ...]) -> Iterator[Transform]:
    num_dims = len(image_size)
    for axis in recipe.flip_axes:
        if axis < num_dims:
            yield RandFlipd(("image", "mask"), prob=0.5, spatial_axis=axis, allow_missing_keys=True)
    yield RandAffined(
        ("image", "mask"),
        prob=0.5,
        rotate_range=(recipe.max_rotation,) * (1 if num_dims == 2 else 3),
        scale_range=(recipe.max_scaling,) * num_dims,
        translate_range=tuple(recipe.max_shift_ratio * side for side in image_size),
        spatial_size=image_size,
        mode=("bilinear", "nearest"),
        padding_mode="border",
        cache_grid=True,
        allow_missing_keys=True,
    )
    if recipe.intensity > 0:
        yield RandScaleIntensityd("image", prob=0.3, factors=recipe.intensity)
        yield RandShiftIntensityd("image", prob=0.3, offsets=recipe.intensity)
        yield RandAdjustContrastd("image", prob=0.2, gamma=(0.8, 1.25))
    if recipe.noise_sd > 0:
        yield RandGaussianNoised("image", prob=0.2, std=recipe.noise_sd)
