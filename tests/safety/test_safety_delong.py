import numpy as np
import pytest
from scipy.stats import kstest
from sklearn.metrics import roc_auc_score

from medlite.safety.delong import delong


def make_pair(num_samples=60, share=0.4, seed=0):
    generator = np.random.default_rng(seed)
    is_positive = np.arange(num_samples) < round(share * num_samples)
    shared = generator.normal(size=num_samples) + is_positive
    first, second = (shared + generator.normal(size=num_samples) for _ in range(2))
    return first.round(1), second.round(1), is_positive


def brute_force(first, second, is_positive):
    """DeLong 1988, equations 3 to 6, with a loop over pairs."""
    wins = [
        np.array([
            [(p > n) + 0.5 * (p == n) for n in scores[~is_positive]] for p in scores[is_positive]
        ])
        for scores in (first, second)
    ]  # fmt: skip
    rows, columns = (np.array([w.mean(axis) for w in wins]) for axis in (1, 0))
    covariance = np.cov(rows) / rows.shape[1] + np.cov(columns) / columns.shape[1]
    return [w.mean() for w in wins], covariance


def test_areas_and_covariance_are_those_of_all_pairs():
    first, second, is_positive = make_pair()
    areas, covariance = brute_force(first, second, is_positive)
    found = delong(first, second, is_positive)
    assert found.areas == pytest.approx(areas)
    assert found.areas[0] == pytest.approx(roc_auc_score(is_positive, first))
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-10)


def test_the_same_scores_have_a_p_value_of_one():
    first, _, is_positive = make_pair()
    assert delong(first, first, is_positive).p_value == 1


def test_a_difference_without_variance_has_no_p_value():
    is_positive = np.array([True, True, False, False])
    perfect, reversed_ = np.array([3.0, 2, 1, 0]), np.array([0.0, 1, 2, 3])
    found = delong(perfect, reversed_, is_positive)
    assert found.areas == (1, 0)
    assert found.p_value is None


def test_one_positive_leaves_no_variance():
    first, second, is_positive = make_pair(share=1 / 60)
    assert delong(first, second, is_positive) is None


def test_p_values_of_equal_models_are_uniform():
    p_values = []
    for seed in range(400):
        found = delong(*make_pair(num_samples=100, seed=seed))
        p_values.append(found.p_value)
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.035)
