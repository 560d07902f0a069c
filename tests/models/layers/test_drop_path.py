"""Stochastic depth drops whole samples, and only while training."""

import pytest
import torch

from medlite.models.layers.drop_path import DropPath, rising_rates


def test_samples_are_dropped_whole_and_the_rest_is_scaled_up():
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(4000, 2, 3)).flatten(1)
    assert set(dropped.amin(1).tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(dropped.amin(1), dropped.amax(1))
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)


def test_nothing_is_dropped_in_evaluation():
    branch = torch.randn(50, 3)
    assert DropPath(0.9).eval()(branch) is branch


def test_rates_rise_from_block_to_block():
    first, second = rising_rates(0.3, (1, 3))
    assert first == (0.0,)
    assert second == pytest.approx((0.1, 0.2, 0.3))


def test_a_single_block_is_never_dropped():
    assert list(rising_rates(0.3, (1,))) == [(0.0,)]
