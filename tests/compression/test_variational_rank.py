import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from medlite.compression.variational_rank import noise_variance, variational_rank


def planted(rows, columns, rank, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, rank, generator=generator) for n in (rows, columns))
    return left @ right.T + noise * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_a_planted_rank_is_found(shape, rank):
    assert variational_rank(planted(*shape, rank, noise=0.5)) == rank


def test_noise_has_no_rank():
    assert variational_rank(planted(48, 120, 0, noise=1.0)) == 0


def test_nothing_has_no_rank():
    assert variational_rank(torch.zeros(4, 6)) == 0


def test_without_noise_the_rank_is_the_algebraic_one():
    assert variational_rank(planted(30, 40, 3, noise=0.0).double()) == 3


def test_the_noise_is_estimated():
    matrix = planted(80, 200, 4, noise=0.7).double()
    spectrum = torch.linalg.svdvals(matrix).square() / 200
    assert noise_variance(spectrum, 80 / 200) == pytest.approx(0.49, rel=0.05)


def test_a_component_stays_just_above_the_papers_threshold():
    """For a square matrix, tau solves log(tau + 1) / tau = 1/2, and x > (1 + tau)(1 + 1/tau)."""
    tau = brentq(lambda t: np.log(t + 1) / t - 0.5, 1, 5)
    threshold = (1 + tau) * (1 + 1 / tau)
    size = 200
    noise = torch.linalg.svdvals(planted(size, size, 0, noise=1.0).double())
    variance = noise_variance(noise.square() / size, 1.0)
    for factor, rank in ((1.02, 1), (0.98, 0)):
        values = noise.clone()
        values[0] = (factor * threshold * variance * size) ** 0.5
        assert variational_rank(torch.diag(values)) == rank
