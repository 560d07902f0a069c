"""How sure the gate is of few patients: exact, by going through all that could have been seen."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binom
from toy_predictions import MARGINS, items_of, make_classes, make_spec, with_logits

from medlite.safety.gate import compare_models
from medlite.safety.resolution import (
    MIN_GROUPS,
    Resolution,
    groups_behind_metric,
    interval_of_proportion,
    least_number,
)
from medlite.safety.statistics import PairedLoss, tango_interval, tango_score


def likeliest_score(lost, gained, pairs, loss):
    """Tango's score with the rate of gains that a search over the likelihood finds."""

    def unlikelihood(gain):
        kept = 1 - 2 * gain - loss
        parts = ((lost, gain + loss), (gained, gain), (pairs - lost - gained, kept))
        return -sum(count * math.log(max(rate, 1e-300)) for count, rate in parts if count)

    bounds = (max(0.0, -loss), (1 - loss) / 2)
    gain = minimize_scalar(unlikelihood, bounds=bounds, method="bounded").x
    return (lost - gained - pairs * loss) / math.sqrt(pairs * (2 * gain + loss - loss**2))


@pytest.mark.parametrize("counts", [(12, 3, 80), (3, 9, 40), (7, 7, 60), (20, 1, 90)])
@pytest.mark.parametrize("loss", [-0.1, 0.05, 0.3])
def test_the_score_takes_the_likeliest_rates(counts, loss):
    assert tango_score(*counts, loss) == pytest.approx(likeliest_score(*counts, loss), rel=1e-3)


def test_the_interval_mirrors_when_the_models_change_places():
    low, high = tango_interval(9, 2, 70)
    assert tango_interval(2, 9, 70) == pytest.approx((-high, -low))
    # Nobody changed: Wilson's interval of none in n, to both sides.
    assert tango_interval(0, 0, 70) == pytest.approx(
        (-3.8415 / 73.8415, 3.8415 / 73.8415), rel=1e-4
    )


def chances(num_pairs, margin, gain_rate):
    """Of PASS and of FAIL where the true loss is just the margin, over all possible outcomes."""
    loss_rate, passes, fails = margin + gain_rate, 0.0, 0.0
    for lost in range(num_pairs + 1):
        of_lost = binom.pmf(lost, num_pairs, loss_rate)
        if of_lost < 1e-6:
            continue
        for gained in range(num_pairs - lost + 1):
            chance = of_lost * binom.pmf(gained, num_pairs - lost, gain_rate / (1 - loss_rate))
            if chance < 1e-6:
                continue
            low, high = interval_of_proportion(lost, gained, num_pairs)
            passes += chance * (high < margin)
            fails += chance * (low > margin)
    return passes, fails


@pytest.mark.parametrize(
    ("num_pairs", "margin"), [(23, 0.15), (73, 0.05), (80, 0.05), (110, 0.05), (189, 0.02)]
)
@pytest.mark.parametrize("gain_rate", [0.0, 0.01, 0.05, 0.2])
def test_a_loss_of_the_margin_passes_in_one_of_forty_at_most(num_pairs, margin, gain_rate):
    passes, _ = chances(num_pairs, margin, gain_rate)
    assert passes < 0.027


def resampled(outcomes, seed=0):
    """A loss as the bootstrap over patients gives it; outcomes: 1 lost, -1 gained, 0 neither."""
    outcomes = np.asarray(outcomes, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(outcomes), size=(2000, len(outcomes)))
    samples = outcomes[drawn].mean(1)
    return PairedLoss(first=1.0, second=0.0, loss=float(outcomes.mean()), samples=samples)


def found_or_missed(num_groups):
    return Resolution(num_groups=num_groups, group_kind="patients", is_proportion=True)


def test_lost_and_gained_patients_are_told_from_the_spread_of_the_loss():
    outcomes = [1] * 12 + [-1] * 5 + [0] * 83
    assert resampled(outcomes).discordant(100) == pytest.approx((12, 5), abs=1)
    # Ten images a patient, all of a patient lost together: patients count, not images.
    clustered = np.repeat([1] * 3 + [0] * 17, 10).reshape(20, 10).mean(1)
    assert resampled(clustered).discordant(20) == pytest.approx((3, 0), abs=0.3)


def test_one_lost_patient_of_a_hundred_is_not_within_five_percent():
    resolution, paired = found_or_missed(100), resampled([1] + [0] * 99)
    assert paired.interval[1] < 0.05 < resolution.interval_of(paired)[1]
    needed = resolution.groups_to_settle(paired, resolution.interval_of(paired), 0.05)
    assert 100 < needed < 160
    _, high = interval_of_proportion(needed / 100, 0, needed)
    assert high < 0.05


def fail_rate(num_groups, rate, margin=0.05, tries=1500):
    generator = np.random.default_rng(0)
    resolution = found_or_missed(num_groups)
    rates = [rate + margin, rate, 1 - margin - 2 * rate]
    drawn = generator.choice([1, -1, 0], p=rates, size=(tries, num_groups))
    seen = {tuple(sorted(outcomes)): 0 for outcomes in drawn.tolist()}
    p_values = {key: resolution.p_value(resampled(key), margin) for key in seen}
    return np.mean([p_values[tuple(sorted(each))] < 0.025 for each in drawn.tolist()])


@pytest.mark.parametrize("num_groups", [2, 5, 8, 12])
def test_few_patients_seldom_fail_by_chance(num_groups):
    assert fail_rate(num_groups, 0.2) < 0.032


def test_many_lost_patients_fail():
    assert found_or_missed(20).p_value(resampled([1] * 10 + [0] * 10), 0.05) < 0.01
    assert found_or_missed(2).p_value(resampled([1, 1]), 0.05) > 0.2


def test_a_mean_over_classes_is_as_sure_as_its_rarest_class():
    predictions = make_classes((100, 100, 100, 3))
    spec = make_spec()
    changed = predictions.logits.copy()
    changed[-1] = changed[-1, ::-1]
    items = items_of(compare_models(predictions, with_logits(predictions, changed), spec, MARGINS))
    assert items["safety/metric_drop"].verdict == "INCONCLUSIVE"
    assert "has 3 patients behind the rarest class" in items["safety/metric_drop"].note


def test_groups_behind_a_metric():
    # (G, C, 4) as tp, fp, fn, tn: class 0 in three groups, class 1 in one, class 2 in none
    counts = torch.zeros(4, 3, 4)
    counts[:3, 0, 0] = counts[3, 0, 3] = counts[3, 1, 0] = counts[:3, 1, 3] = counts[:, 2, 3] = 1
    assert groups_behind_metric(counts, task="classification") == 1
    assert groups_behind_metric(counts[:, [1, 0, 2]], task="segmentation") == 3


def test_groups_to_pass():
    assert [found_or_missed(1).groups_to_pass(margin) for margin in (0.05, 0.02, 0.15)] == [
        73, 189, 23,
    ]  # fmt: skip
    areas = Resolution(num_groups=5, group_kind="patients", is_proportion=False)
    assert areas.groups_to_pass(0.05) == MIN_GROUPS
    assert [least_number(lambda n: n >= 7), least_number(lambda n: n >= 8)] == [7, 8]
