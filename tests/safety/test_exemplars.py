import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr
from test_safety_gate import make_classes, make_spec, slightly_changed, with_logits

from medlite.safety.exemplars import (
    average_predictions,
    find_exemplars,
    jensen_shannon,
    measure_disagreement,
    rank_correlation,
)
from medlite.types import Predictions

MANY = make_spec(class_counts=(100,) * 10)


def make_many(num_samples=200, seed=0):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_samples, 10)).astype(np.float32)
    return Predictions(
        logits=logits, targets=random.integers(10, size=num_samples),
        groups=tuple(map(str, range(num_samples))),
    )  # fmt: skip


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_rank_correlation_is_that_of_scipy_with_ties():
    random = np.random.default_rng(0)
    first, second = random.integers(4, size=(2, 50, 9)).astype(float)
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    assert rank_correlation(first, second) == pytest.approx(np.array(expected))


def test_rows_without_an_order_agree_with_each_other_alone():
    constant, rising = np.ones((1, 9)), np.arange(9.0)[None]
    assert rank_correlation(constant, constant) == [1]
    assert rank_correlation(constant, rising) == [0]


def test_the_divergence_is_that_of_scipy():
    first, second = (softmax(np.random.default_rng(s).normal(size=(20, 4))) for s in (0, 1))
    expected = [jensenshannon(a, b, base=2) ** 2 for a, b in zip(first, second, strict=True)]
    assert jensen_shannon(first, second) == pytest.approx(np.array(expected))
    certain = np.array([[1.0, 0.0]])
    assert jensen_shannon(certain, certain[:, ::-1]) == [1]


def test_exemplars_are_the_lowest_five_per_cent_of_the_rank_correlations():
    before = make_many()
    after = with_logits(before, before.logits + np.random.default_rng(9).normal(size=(200, 10)))
    report = find_exemplars(before, after, MANY)
    rho = np.array(
        [spearmanr(a, b).statistic for a, b in zip(before.logits, after.logits, strict=True)]
    )
    assert [e.position for e in report.exemplars] == np.argsort(rho)[: int(0.05 * 200)].tolist()
    assert report.exemplars[0].disagreement == pytest.approx(1 - rho.min())
    assert (report.rule, report.num_images) == ("spearman", 200)


def test_few_scores_are_compared_by_divergence():
    before = make_classes(per_class=(40, 40, 40, 40))
    after = slightly_changed(before, size=1.0)
    report = find_exemplars(before, after, make_spec())
    divergence = [
        jensenshannon(a, b, base=2) ** 2
        for a, b in zip(*(softmax(s.logits.astype(float)) for s in (before, after)), strict=True)
    ]
    assert report.rule == "jensen_shannon"
    assert [e.position for e in report.exemplars] == np.argsort(divergence)[::-1][:8].tolist()


def test_two_classes_of_one_logit_are_two_scores():
    spec = make_spec(labels="binary", class_counts=(50, 50))
    logits = np.linspace(-3, 3, 40, dtype=np.float32)[:, None]
    before = Predictions(
        logits=logits, targets=np.arange(40) % 2, groups=tuple(map(str, range(40)))
    )
    share = 1 / (1 + np.exp(-logits.astype(float)))
    pairs = [np.hstack((p, 1 - p)) for p in (share, share[::-1])]
    expected = [jensenshannon(a, b, base=2) ** 2 for a, b in zip(*pairs, strict=True)]
    found = measure_disagreement(before, with_logits(before, logits[::-1]), spec)
    assert found == pytest.approx(np.array(expected))


def test_a_broken_rare_class_is_over_represented():
    before = make_classes(per_class=(300, 300, 300, 30))
    broken = before.logits.copy()
    broken[before.targets == 3, 3] -= 6
    report = find_exemplars(before, with_logits(before, broken), make_spec())
    rare = next(c for c in report.classes if c.class_name == "Class 3")
    assert (rare.num_exemplars, rare.num_others) == (30, 0)
    assert rare.odds_ratio is None  # infinite
    assert rare.interval[0] > 50
    assert rare.interval[1] is None
    assert rare.p_value < 1e-6
    json.dumps(report.to_json(), allow_nan=False)


def test_odds_are_those_of_the_table_and_chance_is_not_called_a_pattern():
    before = make_classes(per_class=(100, 100, 100, 100))
    report = find_exemplars(before, slightly_changed(before, size=0.5), make_spec())
    assert len(report.exemplars) == 20
    for each in report.classes:
        a, b = each.num_exemplars, each.num_others
        by_hand = (a / (20 - a)) / (b / (380 - b))
        assert each.odds_ratio == pytest.approx(by_hand, rel=0.05)
        assert each.interval[0] < each.odds_ratio < each.interval[1]
        assert each.p_value > 0.05


def test_images_that_lose_dice_are_the_exemplars_of_masks():
    spec = make_spec(task="segmentation", labels="binary", class_counts=(900, 100))
    masks = np.zeros((40, 8, 8), np.int64)
    masks[:, 2:6, 2:6] = 1
    masks[5] = 0
    logits = np.float32(2 * masks - 1)[:, None]
    before = Predictions(logits=logits, targets=masks, groups=tuple(map(str, range(40))))
    worse = logits.copy()
    worse[7, :, 2:4] = -1
    worse[11, :, 2] = -1
    worse[5] = 1  # no foreground, no Dice to lose
    report = find_exemplars(before, with_logits(before, worse), spec)
    assert [e.position for e in report.exemplars] == [7, 11]
    assert report.exemplars[0].disagreement == pytest.approx(1 - 2 * 8 / (8 + 16))
    assert report.rule == "dice_drop"


def test_identical_models_have_no_exemplars():
    predictions = make_many()
    report = find_exemplars(predictions, predictions, MANY)
    assert (report.exemplars, report.classes) == ((), ())


@pytest.mark.parametrize("num_classes", [9, 18, 19, 32])
def test_equal_ranks_agree_to_the_last_bit(num_classes):
    scores = np.random.default_rng(0).normal(size=(50, num_classes))
    assert (rank_correlation(scores, 2 * scores) == 1).all()


def test_outputs_that_are_not_finite_have_no_exemplars():
    predictions = make_many()
    broken = replace(predictions, logits=np.full_like(predictions.logits, np.nan))
    assert find_exemplars(predictions, broken, MANY) is None


@pytest.mark.parametrize(
    ("labels", "shape"), [("multiclass", (6, 4)), ("multilabel", (6, 4)), ("binary", (6, 1, 3, 3))]
)
def test_scores_of_seeds_are_averaged_as_probabilities(labels, shape):
    random = np.random.default_rng(0)
    logits = np.float32(random.normal(0, 3, size=(3, *shape)))
    said = [Predictions(logits=each, targets=np.zeros(6, int), groups=()) for each in logits]
    averaged = average_predictions(said, make_spec(labels=labels)).logits
    as_shares = softmax if labels == "multiclass" else lambda each: 1 / (1 + np.exp(-each))
    expected = np.mean([as_shares(each.astype(float)) for each in logits], axis=0)
    assert as_shares(averaged) == pytest.approx(expected, rel=1e-9)
    assert as_shares(logits.mean(0)) != pytest.approx(expected, rel=1e-2), "not of the logits"


@pytest.mark.parametrize("labels", ["multiclass", "multilabel"])
def test_certain_models_have_a_finite_average(labels):
    certain = np.float32([[2000, -2000]])
    said = [Predictions(logits=certain, targets=np.zeros(1, int), groups=("a",))] * 2
    assert np.isfinite(average_predictions(said, make_spec(labels=labels)).logits).all()
