"""How good an image is, by what can be measured without a reference.

Shapes: C channels, H W D height width depth.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.ndimage import convolve, laplace

NOISE_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
"""answers neither to constant patches nor to straight slopes"""

QUALITIES = ("brightness", "contrast", "sharpness", "noise")


def measure_quality(images: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Each of QUALITIES of every image, (N,).

    brightness: mean. contrast: standard deviation. sharpness: variance of the Laplacian
    (Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy: a comparative
    study") over that of the image, so that contrast does not count twice. noise: standard deviation
    of white noise (Immerkaer 1996, "Fast noise variance estimation", equation 4), which fine
    texture raises too. Channels are averaged first; volumes are looked at slice by slice.

    Args:
        images: (C, H, W[, D]) each, of at least 3 by 3 pixels.
    """
    rows = [_qualities(image.mean(0, dtype=np.float64)) for image in images]
    return dict(zip(QUALITIES, np.array(rows).reshape(-1, len(QUALITIES)).T, strict=True))


def _qualities(image: np.ndarray) -> tuple[float, ...]:
    planes = np.atleast_3d(image).transpose(2, 0, 1)
    variance = image.var()
    sharpness = np.mean([laplace(plane).var() for plane in planes])
    noise = np.mean([_noise_sd(plane) for plane in planes])
    relative = sharpness / variance if variance > 0 else 0.0
    return float(image.mean()), float(image.std()), float(relative), float(noise)


def _noise_sd(plane: np.ndarray) -> float:
    answers = np.abs(convolve(plane, NOISE_KERNEL)[1:-1, 1:-1])
    return float(np.sqrt(np.pi / 2) / 6 * answers.mean())
