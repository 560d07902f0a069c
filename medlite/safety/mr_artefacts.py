"""What moves in the scanner, written into the lines of k-space.

Shapes: C channels, H W D height width depth; the rows of an image are its phase-encoding steps.
"""

from __future__ import annotations

import numpy as np

NUM_MOVEMENTS = 4
"""times that the patient moves during one scan"""


def add_motion(
    image: np.ndarray, max_shift_ratio: float, random: np.random.Generator
) -> np.ndarray:
    """A patient who lies elsewhere from some phase-encoding step on: blur and ripples along rows.

    Rigid shifts in plane as linear phases of k-space, as in Wood & Henkelman 1985, "MR image
    artifacts from periodic motion", Medical Physics 12. The centre of k-space, which holds the
    contrast, is taken at rest.

    Args:
        image: (C, H, W[, D]), not negative.
        max_shift_ratio: of the shorter side in plane.
        random: of when and whereto.
    """
    rows, columns = image.shape[1:3]
    start = random.integers(0, rows, NUM_MOVEMENTS)
    reach = max_shift_ratio * min(rows, columns)
    shift = random.uniform(-reach, reach, (NUM_MOVEMENTS, 2))
    moves = np.zeros((rows, 2))
    for first, by in zip(np.sort(start), shift, strict=True):
        moves[first:] = by
    row_frequency, column_frequency = np.fft.fftfreq(rows), np.fft.fftfreq(columns)
    moves = np.fft.ifftshift(moves, axes=0)  # steps run from the lowest frequency to the highest
    moves[np.abs(row_frequency) < 1.5 / rows] = 0
    phase = row_frequency[:, None] * moves[:, :1] + column_frequency * moves[:, 1:]
    return _through_k_space(image, np.exp(-2j * np.pi * phase))


def add_ghosting(image: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """Faint copies along rows, from every n-th phase-encoding step being weaker (breath, pulse).

    Args:
        image: (C, H, W[, D]), not negative.
        strength: share of those steps' signal that is lost, in [0, 1].
        random: of n (2 to 5, so many ghosts) and of the first such step.
    """
    rows = image.shape[1]
    period = int(random.integers(2, 6))
    frequency = np.abs(np.fft.fftfreq(rows))
    is_weaker = (np.arange(rows) + random.integers(period)) % period == 0
    is_weaker &= frequency >= 1.5 / rows
    return _through_k_space(image, np.where(is_weaker, 1 - strength, 1.0)[:, None])


def _through_k_space(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Multiply the spectrum of each slice, (C, H, W[, D]), by (H, W or 1)."""
    factors = factors.reshape(1, *factors.shape, *(1,) * (image.ndim - 3))
    spectrum = np.fft.fft2(image, axes=(1, 2)) * factors
    return np.abs(np.fft.ifft2(spectrum, axes=(1, 2))).astype(np.float32)
