"""What images suffer between the patient and the model, in five severities.

The idea of a suite for each modality is that of Di Salvo, Doerrich & Ledig, "MedMNIST-C:
Comprehensive benchmark and improved classifier robustness by simulating realistic image
corruptions", arXiv:2406.17536, after Hendrycks & Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", arXiv:1903.12261. The table of severities is
medlite's own; lengths are shares of the image's side, so that it holds for any size.

Shapes: C channels, H W D height width depth.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.transforms import (
    GaussianSmooth,
    GibbsNoise,
    RandBiasField,
    RandGaussianNoise,
    RandRicianNoise,
    Resize,
    ScaleIntensityFixedMean,
    Zoom,
)

from medlite.monai_metadata import no_metadata
from medlite.safety.mr_artefacts import add_ghosting, add_motion

Change = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""(image (C, H, W[, D]) in [0, 1], level, random) -> the same shape"""

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """One way in which images go wrong.

    levels: what severities 1 to 5 hand to `change`. moves_pixels: the mask of an image goes
    through the same change.
    """

    change: Change
    levels: tuple[float, float, float, float, float]
    moves_pixels: bool = False


def add_gaussian_noise(image: np.ndarray, sd: float, random: np.random.Generator) -> np.ndarray:
    """Electronic noise; `sd` in units of the value range."""
    transform = RandGaussianNoise(prob=1, std=sd, sample_std=False)
    transform.set_random_state(seed=int(random.integers(2**31)))
    return np.asarray(transform(image))


def add_rician_noise(image: np.ndarray, sd: float, random: np.random.Generator) -> np.ndarray:
    """Noise of the magnitude of a complex signal, as in MR; dark tissue becomes brighter."""
    transform = RandRicianNoise(prob=1, std=sd, sample_std=False)
    transform.set_random_state(seed=int(random.integers(2**31)))
    return np.asarray(transform(image))


def add_speckle(image: np.ndarray, sd: float, random: np.random.Generator) -> np.ndarray:
    """Noise in proportion to the signal, as of coherent waves (ultrasound, OCT)."""
    return image * (1 + sd * random.standard_normal(image.shape, dtype=np.float32))


def blur(image: np.ndarray, sigma_ratio: float, random: np.random.Generator) -> np.ndarray:
    """Defocus; `sigma_ratio` of the shorter side in plane, in plane alone."""
    sigma = sigma_ratio * min(image.shape[1:3])
    margin = math.ceil(4 * sigma)  # MONAI takes what lies outside for zero, which darkens edges
    still = image.ndim - 3
    around = ((0, 0), *((margin, margin),) * 2, *((0, 0),) * still)
    smooth = GaussianSmooth(sigma=(sigma, sigma, *(0.0,) * still))
    blurred = np.asarray(smooth(np.pad(image, around, mode="edge")))
    return blurred[:, margin:-margin, margin:-margin]


def lower_contrast(image: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Pull intensities towards their mean, by a share of their distance from it."""
    return np.asarray(ScaleIntensityFixedMean(factor=-share)(image))


def shift_intensity(image: np.ndarray, by: float, random: np.random.Generator) -> np.ndarray:
    """Another exposure, gain or window: brighter or darker by a share of the value range."""
    return image + random.choice((-by, by))


def add_bias_field(image: np.ndarray, largest: float, random: np.random.Generator) -> np.ndarray:
    """A smooth gain: coil sensitivity in MR, uneven illumination in optical images."""
    transform = RandBiasField(prob=1, coeff_range=(-largest, largest))
    transform.set_random_state(seed=int(random.integers(2**31)))
    return np.asarray(transform(image))


def add_gibbs_ringing(image: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Ripples at edges, from the outer share of k-space not being measured."""
    return np.asarray(GibbsNoise(alpha=share)(image))


def compress_jpeg(image: np.ndarray, quality: float, random: np.random.Generator) -> np.ndarray:
    """Lossy storage, slice by slice; three channels as colours, others one by one."""
    slices = image[..., None] if image.ndim == 3 else image
    stored = [_through_jpeg(slices[..., z], int(quality)) for z in range(slices.shape[-1])]
    return np.stack(stored, axis=-1).reshape(image.shape)


def lose_resolution(image: np.ndarray, factor: float, random: np.random.Generator) -> np.ndarray:
    """Fewer pixels in plane, interpolated back: a coarser detector or a smaller file."""
    coarse = [max(2, round(factor * side)) for side in image.shape[1:3]]
    return _resampled(image, (*coarse, *image.shape[3:]))


def change_spacing(image: np.ndarray, factor: float, random: np.random.Generator) -> np.ndarray:
    """Another pixel spacing that nobody corrected: all is larger, or smaller, about the centre."""
    zoom = factor if random.random() < 0.5 else 1 / factor
    mode = "nearest" if image.dtype == np.int64 else _linear(image)
    changed = Zoom(zoom=(zoom, zoom, *(1.0,) * (image.ndim - 3)), mode=mode)(
        torch.from_numpy(image)
    )
    return np.asarray(changed, dtype=image.dtype)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(change=add_gaussian_noise, levels=(0.02, 0.05, 0.08, 0.12, 0.18)),
    "rician_noise": Corruption(change=add_rician_noise, levels=(0.02, 0.05, 0.08, 0.12, 0.18)),
    "speckle": Corruption(change=add_speckle, levels=(0.1, 0.2, 0.3, 0.45, 0.6)),
    "blur": Corruption(change=blur, levels=(0.006, 0.012, 0.02, 0.03, 0.045)),
    "contrast": Corruption(change=lower_contrast, levels=(0.15, 0.3, 0.45, 0.6, 0.75)),
    "intensity_shift": Corruption(change=shift_intensity, levels=(0.04, 0.08, 0.13, 0.19, 0.26)),
    "bias_field": Corruption(change=add_bias_field, levels=(0.1, 0.18, 0.27, 0.37, 0.5)),
    "motion": Corruption(change=add_motion, levels=(0.01, 0.02, 0.035, 0.055, 0.08)),
    "ghosting": Corruption(change=add_ghosting, levels=(0.15, 0.3, 0.45, 0.6, 0.8)),
    "gibbs": Corruption(change=add_gibbs_ringing, levels=(0.45, 0.55, 0.65, 0.74, 0.82)),
    "jpeg": Corruption(change=compress_jpeg, levels=(60, 40, 25, 15, 8)),
    "resolution": Corruption(change=lose_resolution, levels=(0.75, 0.6, 0.48, 0.36, 0.26)),
    "spacing": Corruption(
        change=change_spacing, levels=(1.08, 1.16, 1.25, 1.36, 1.5), moves_pixels=True
    ),
}

_GEOMETRY = ("resolution", "spacing")
_LIGHT = ("contrast", "intensity_shift", "bias_field")
_OPTICAL = ("gaussian_noise", "blur", *_LIGHT, "jpeg", *_GEOMETRY)

SUITES: dict[str, tuple[str, ...]] = {
    "ct": ("gaussian_noise", "blur", "contrast", "intensity_shift", *_GEOMETRY),
    "ct_patch": ("gaussian_noise", "blur", "contrast", "intensity_shift", *_GEOMETRY),
    "mr": ("rician_noise", "blur", *_LIGHT, "motion", "ghosting", "gibbs", *_GEOMETRY),
    "xray": ("gaussian_noise", "blur", "contrast", "intensity_shift", "jpeg", *_GEOMETRY),
    "ultrasound": ("speckle", "blur", "contrast", "intensity_shift", "jpeg", *_GEOMETRY),
    "oct": ("speckle", "blur", "contrast", "intensity_shift", "jpeg", *_GEOMETRY),
    "fundus": _OPTICAL,
    "microscopy": _OPTICAL,
    "dermatoscopy": _OPTICAL,
    "shape": ("blur", *_GEOMETRY),
    "phantom": ("gaussian_noise", "blur", *_LIGHT, *_GEOMETRY),
    "other": _OPTICAL,
}
"""What each modality meets; others fall back to "other"."""


def suite_of(modality: str) -> tuple[str, ...]:
    """The corruptions that images of a modality meet."""
    return SUITES.get(modality, SUITES["other"])


def corrupt(
    image: np.ndarray,
    target: np.ndarray,
    *,
    name: str,
    severity: int,
    position: int,
    value_range: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """One image as `name` leaves it, and its target: the same bits whoever asks.

    Intensities stay in `value_range`, as those of a file do. Chance depends on
    (position, name, severity) alone.

    Args:
        image: (C, H, W[, D]) float32.
        target: of any kind; a mask (H, W[, D]) moves with the pixels.
        name: a key of `CORRUPTIONS`.
        severity: 0 (as it is) to 5.
        position: of the sample in its split.
        value_range: the lowest and the highest value that the preprocessing gives.
    """
    if severity == 0:
        return image.copy(), target
    corruption = CORRUPTIONS[name]
    level, seed = corruption.levels[severity - 1], (zlib.crc32(name.encode()), severity, position)
    low, high = value_range
    scale = np.float32(high - low)
    with no_metadata():
        unit = np.clip((image - low) / scale, 0, 1, dtype=np.float32)
        changed = corruption.change(unit, level, np.random.default_rng(seed))
        if corruption.moves_pixels and target.ndim == image.ndim - 1:
            moved = corruption.change(target[None], level, np.random.default_rng(seed))
            target = moved[0]
    changed = np.clip(np.asarray(changed, dtype=np.float32), 0, 1) * scale + np.float32(low)
    return np.ascontiguousarray(changed, dtype=np.float32), target


def _resampled(image: np.ndarray, coarse: Sequence[int]) -> np.ndarray:
    """Averaged down to `coarse` and interpolated back."""
    small = Resize(spatial_size=coarse, mode="area")(torch.from_numpy(image))
    return np.asarray(Resize(spatial_size=image.shape[1:], mode=_linear(image))(small))


def _linear(image: np.ndarray) -> str:
    return "bilinear" if image.ndim == 3 else "trilinear"


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """(C, H, W) in [0, 1], to eight bits and back."""
    if len(image) not in (1, 3):
        return np.concatenate([_through_jpeg(channel[None], quality) for channel in image])
    from PIL import Image

    pixels = (255 * image).round().astype(np.uint8)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    stored = np.asarray(Image.open(buffer), dtype=np.float32) / 255
    return stored[None] if stored.ndim == 2 else stored.transpose(2, 0, 1)
