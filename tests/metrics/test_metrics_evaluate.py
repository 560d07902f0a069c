import json
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
from test_metrics_task import make_spec

from medlite.metrics.evaluate import evaluate, reliability
from medlite.metrics.intervals import (
    bootstrap,
    percentile_interval,
    resampled_weights,
    wilson_interval,
)
from medlite.metrics.names import class_keys
from medlite.metrics.statistics import grouped_scores
from medlite.metrics.task import build_metrics
from medlite.types import Predictions


def make_predictions(spec, num_samples=60, num_groups=20, seed=0):
    generator = np.random.default_rng(seed)
    num_names = len(spec.class_names)
    shape = spec.image_size if spec.task == "segmentation" else ()
    logits = generator.normal(size=(num_samples, spec.num_classes, *shape)).astype(np.float32)
    if spec.labels == "multilabel":
        targets = generator.integers(2, size=(num_samples, num_names)).astype(np.float32)
    else:
        targets = generator.integers(num_names, size=(num_samples, *shape))
    groups = tuple(f"patient {i % num_groups}" for i in range(num_samples))
    return Predictions(logits=logits, targets=targets, groups=groups)


def by_name(rows):
    return {row.name: row for row in rows}


CASES = [
    ("classification", "binary", 2),
    ("classification", "multiclass", 4),
    ("classification", "multilabel", 3),
    ("segmentation", "binary", 2),
    ("segmentation", "multiclass", 3),
]


@pytest.mark.parametrize(("task", "labels", "num_names"), CASES)
def test_the_test_scores_equal_the_metrics_that_training_watches(task, labels, num_names):
    spec = make_spec(task, labels, num_names)
    predictions = make_predictions(spec)
    rows = by_name(evaluate(predictions, spec))
    watched = build_metrics(spec)
    watched.update(torch.from_numpy(predictions.logits), torch.from_numpy(predictions.targets))
    for name, value in watched.compute().items():
        row = rows[f"test/{name}"]
        assert row.value == pytest.approx(float(value), abs=1e-6)
        assert row.spread[0] < row.value < row.spread[1]
        assert row.higher_is_better


@pytest.mark.parametrize(("task", "labels", "num_names"), CASES)
def test_every_measurement_is_finite_and_named_once(task, labels, num_names):
    spec = make_spec(task, labels, num_names)
    rows = evaluate(make_predictions(spec), spec, prefix="val")
    assert len({row.name for row in rows}) == len(rows) > 8
    assert all(row.name.startswith("val/") for row in rows)
    assert all(math.isfinite(row.value) for row in rows)
    json.dumps([row.value for row in rows], allow_nan=False)


def test_a_class_that_does_not_occur_is_unavailable_with_its_reason():
    spec = make_spec("classification", "multiclass", 4)
    predictions = make_predictions(spec)
    predictions.targets[predictions.targets == 3] = 0
    rows = by_name(evaluate(predictions, spec))
    for name in ("test/sensitivity/class_3", "test/auc/class_3"):
        assert rows[name].source == "unavailable"
        assert rows[name].note == "no image of this split is of class 'class 3'"
    assert rows["test/auc"].source == "measured"


def test_one_patient_has_no_interval():
    spec = make_spec("segmentation", "binary", 2)
    rows = by_name(evaluate(make_predictions(spec, 4, num_groups=1), spec, prefix="test"))
    assert rows["test/dice"].spread is None
    assert rows["test/dice"].note == f"no interval: it rests on one {spec.group_kind}"


def test_outputs_that_are_not_finite_make_the_scores_unavailable():
    spec = make_spec("segmentation", "binary", 2)
    predictions = make_predictions(spec)
    predictions.logits[3, 0, 0, 0] = np.inf
    rows = evaluate(predictions, spec)
    assert {row.note for row in rows} == {"the outputs of 1 of 60 images are not finite"}
    assert "test/dice" in by_name(rows)
    assert reliability(predictions, spec) == []


def test_dice_per_image_leaves_out_images_without_foreground():
    spec = make_spec("segmentation", "binary", 2)
    logits = np.full((3, 1, 8, 8), -1.0, dtype=np.float32)
    targets = np.zeros((3, 8, 8), dtype=np.int64)
    logits[0, 0, :4], targets[0, :4] = 1, 1
    logits[1, 0, :4], targets[1, 2:6] = 1, 1
    logits[2, 0, :4] = 1
    predictions = Predictions(logits=logits, targets=targets, groups=("a", "b", "c"))
    rows = by_name(evaluate(predictions, spec))
    assert rows["test/dice_per_image"].value == pytest.approx((1 + 0.5) / 2)
    assert rows["test/dice"].value == pytest.approx(2 * 48 / (96 + 64))


def test_sensitivity_interval_is_wilsons():
    spec = make_spec("classification", "multiclass", 3)
    predictions = make_predictions(spec, num_groups=60)
    row = by_name(evaluate(predictions, spec))["test/sensitivity/class_1"]
    of_class = predictions.targets == 1
    hits = int((predictions.logits.argmax(1)[of_class] == 1).sum())
    reference = binomtest(hits, int(of_class.sum())).proportion_ci(method="wilson")
    assert row.value == hits / of_class.sum()
    assert row.spread == pytest.approx((reference.low, reference.high))
    assert wilson_interval(0, 10)[0] == pytest.approx(0)


def test_hausdorff_distance_equals_a_brute_force_over_outlines():
    spec = make_spec("segmentation", "binary", 2)
    decided, target = np.zeros((8, 8), dtype=bool), np.zeros((8, 8), dtype=bool)
    decided[1, 1:3], target[4, 2:7] = True, True
    predictions = Predictions(
        logits=np.where(decided, 1.0, -1.0).astype(np.float32)[None, None],
        targets=target.astype(np.int64)[None],
        groups=("a",),
    )
    row = by_name(evaluate(predictions, spec))["test/hausdorff95_px"]
    distances = cdist(np.argwhere(decided), np.argwhere(target))
    expected = max(np.quantile(distances.min(axis), 0.95) for axis in (0, 1))
    assert row.value == pytest.approx(expected, rel=1e-5)
    assert row.n == 1


def test_statistics_at_integer_weights_equal_repeated_groups():
    spec = make_spec("classification", "multiclass", 3)
    predictions = make_predictions(spec, num_groups=7)
    weights = next(resampled_weights(7, 3, seed=1))
    scores = grouped_scores(predictions, spec)
    names = sorted(set(predictions.groups))
    for row in range(3):
        where = np.concatenate(
            [
                np.repeat([i for i, g in enumerate(predictions.groups) if g == name], int(weight))
                for name, weight in zip(names, weights[row], strict=True)
            ]
        ).astype(int)
        repeated = Predictions(
            logits=predictions.logits[where],
            targets=predictions.targets[where],
            groups=tuple(map(str, where)),
        )
        again = grouped_scores(repeated, spec)
        for name, statistic in scores.statistics.items():
            assert float(statistic(weights)[row]) == pytest.approx(again.value(name)), name


def test_resamples_draw_whole_groups_as_often_as_there_are():
    chunks = list(resampled_weights(12, 250, seed=0))
    weights = torch.cat(chunks)
    assert weights.shape == (250, 12)
    assert (weights.sum(1) == 12).all()
    assert float(weights.var()) == pytest.approx(1 - 1 / 12, rel=0.1)


def test_bootstrap_interval_of_a_mean_approaches_the_normal_one():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=400))
    samples = bootstrap(
        {"mean": lambda weights: weights @ values / weights.sum(1)},
        num_groups=400, num_resamples=4000,
    )["mean"]  # fmt: skip
    low, high = percentile_interval(samples)
    error = float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.15 * error)


def test_an_interval_needs_values_in_half_of_the_resamples():
    assert percentile_interval(np.array([np.nan, np.nan, 1.0])) is None
    assert percentile_interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)


def test_reliability_counts_every_sample_once():
    spec = make_spec("classification", "multiclass", 4)
    predictions = make_predictions(spec)
    rows = reliability(predictions, spec)
    assert sum(row["count"] for row in rows) == 60
    probability = torch.from_numpy(predictions.logits).softmax(1).numpy()
    is_top = (probability.max(1) >= rows[5]["lower"]) & (probability.max(1) < rows[5]["upper"])
    assert rows[5]["count"] == is_top.sum()
    hits = probability.argmax(1)[is_top] == predictions.targets[is_top]
    assert rows[5]["accuracy"] == pytest.approx(hits.mean())


def test_class_keys_are_plain_and_different():
    assert class_keys(["No finding", "Grade 3/4", "Grade 3-4", "Überfunktion", "!"]) == (
        "no_finding", "grade_3_4", "grade_3_4_2", "uberfunktion", "class_4",
    )  # fmt: skip


def test_binary_auc_of_the_second_class_is_the_auc():
    spec = make_spec("classification", "binary", 2)
    predictions = make_predictions(spec)
    rows = by_name(evaluate(predictions, spec))
    expected = roc_auc_score(predictions.targets, predictions.logits[:, 0])
    assert rows["test/auc"].value == rows["test/auc/class_1"].value == pytest.approx(expected)
