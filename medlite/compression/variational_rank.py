"""The rank of a noisy matrix by variational Bayes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_VARIANCES = 2000
"""tried on a logarithmic scale; the free energy can have several minima"""


def variational_rank(matrix: Tensor) -> int:
    """How many components of a matrix stand out of its noise; may be 0.

    The global analytic solution of empirical variational Bayesian matrix factorisation, with the
    noise estimated as well: Nakajima, Sugiyama, Babacan and Tomioka, "Global Analytic Solution of
    Fully-observed Variational Bayesian Matrix Factorization", JMLR 14, 2013; the bounds of the
    noise are those of Nakajima et al., "Perfect Dimensionality Recovery by Variational Bayesian
    PCA", NIPS 2012. It answers for few components in white noise. The weights of trained nets are
    rarely that, and it then tends to keep next to nothing.

    Args:
        matrix: any shape; float64 inside.
    """
    num_rows, num_columns = sorted(matrix.shape)
    aspect = num_rows / num_columns
    spectrum = torch.linalg.svdvals(matrix.double()).square() / num_columns
    if not spectrum.sum() > 0:
        return 0
    threshold = _threshold(aspect)
    return int((spectrum > threshold * noise_variance(spectrum, aspect)).sum())


def noise_variance(spectrum: Tensor, aspect: float) -> float:
    """The variance of the noise at which the free energy is least.

    Args:
        spectrum: (L,) squared singular values, largest first, over the longer side of the matrix.
        aspect: L over the longer side.
    """
    num_rows, threshold = len(spectrum), _threshold(aspect)
    num_components = min(math.ceil(num_rows / (1 + aspect)) - 1, num_rows - 1)
    noise = spectrum[num_components:]
    high = float(spectrum.mean())
    low = max(float(noise[0]) / threshold, float(noise.mean()), 1e-12 * high)
    steps = torch.linspace(math.log(low), math.log(high), NUM_VARIANCES, dtype=spectrum.dtype)
    variances = steps.exp()[:, None]
    return float(variances[_free_energy(spectrum / variances, variances, aspect).argmin()])


def _threshold(aspect: float) -> float:
    """Above it, in units of the noise, a component stays.

    tau is the zero of phi(tau) + phi(tau / aspect), phi(z) = log(z + 1) / z - 1/2: 2.5129 for a
    square matrix, and for others as near to the papers' 2.5129 sqrt(aspect) as matters.
    """
    tau = 2.5129 * math.sqrt(aspect)
    return (1 + tau) * (1 + aspect / tau)


def _free_energy(ratios: Tensor, variances: Tensor, aspect: float) -> Tensor:
    """Up to a constant and a factor, for spectra in units of the noise (variances, L)."""
    is_kept = ratios > _threshold(aspect)
    excess = torch.where(is_kept, ratios, 2 + 2 * aspect) - (1 + aspect)
    tau = (excess + (excess.square() - 4 * aspect).clamp_min(0).sqrt()) / 2
    gain = (tau + 1).log() + aspect * (tau / aspect + 1).log() - tau
    return (ratios + variances.log() + gain.where(is_kept, 0)).sum(1)
