"""Percentiles keep their promise, and intervals hold the truth as often as they say."""

import numpy as np
import pytest
from scipy.stats import binom

from medlite.bench.images import ImageFile
from medlite.bench.percentiles import least_samples, percentile_bound, round_interval


@pytest.mark.parametrize(("percentile", "least"), [(0.9, 64), (0.95, 130), (0.99, 662)])
def test_least_samples_are_those_of_mlperf(percentile, least):
    assert least_samples(percentile) == least
    assert percentile_bound(range(least - 1), percentile) is None
    assert percentile_bound(range(least), percentile) is not None


def test_90th_percentile_of_200_is_the_191st_value():
    samples = np.random.default_rng(0).permutation(np.arange(1, 201))
    assert percentile_bound(samples, 0.9) == 191


def test_1000_samples_bound_the_tail_with_their_923rd_value_at_most():
    bound = percentile_bound(np.arange(1, 1001), 0.9)
    assert binom.cdf(1000 - bound + 1, 1000, 0.1) <= 0.01 < binom.cdf(1000 - bound + 2, 1000, 0.1)


def test_bound_holds_in_99_of_100_experiments():
    generator = np.random.default_rng(0)
    bounds = [percentile_bound(generator.random(200), 0.9) for _ in range(2000)]
    assert np.mean(np.array(bounds) >= 0.9) >= 0.985


def test_interval_of_a_mean_is_that_of_its_rounds():
    generator = np.random.default_rng(0)
    rounds = generator.normal(5.0, 1.0, size=(200, 10))
    low, high = round_interval(lambda samples: float(samples.mean()), list(rounds))
    half = 1.96 * rounds.mean(1).std(ddof=1) / np.sqrt(200)
    assert low == pytest.approx(rounds.mean() - half, abs=0.02)
    assert high == pytest.approx(rounds.mean() + half, abs=0.02)


def test_pairing_cancels_what_disturbs_both_candidates():
    generator = np.random.default_rng(0)
    disturbance = np.linspace(1, 3, 20)[:, None]
    slow = disturbance * generator.normal(2.0, 0.01, size=(20, 10))
    quick = disturbance * generator.normal(1.0, 0.01, size=(20, 10))

    def ratio(a, b):
        return float(np.median(a) / np.median(b))

    low, high = round_interval(ratio, list(slow), list(quick))
    assert low <= 2.0 <= high
    assert high - low < 0.1


def test_intervals_repeat_exactly():
    rounds = list(np.random.default_rng(0).random((5, 4)))
    assert round_interval(np.mean, rounds) == round_interval(np.mean, rounds)


def test_image_file_gives_the_images_and_begins_again_at_the_end(tmp_path):
    images = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    file = ImageFile(tmp_path / "images.npy")
    assert (len(file), file.image_shape) == (5, (2, 3, 4))
    np.testing.assert_array_equal(file.batch(3, 4), images[[3, 4, 0, 1]])
