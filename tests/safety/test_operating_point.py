import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, roc_curve
from toy_predictions import MARGINS, items_of, make_classes, make_masks, make_spec, with_logits

from medlite.errors import ConfigError
from medlite.metrics.paired_scores import group_of
from medlite.safety.gate import compare_models
from medlite.safety.operating_point import choose_operating_points, point_statistics, thresholds_of
from medlite.safety.plan import check_margins
from medlite.safety_settings import SafetyMargins
from medlite.types import Predictions


def softmax(logits):
    weights = np.exp(logits.astype(np.float64))
    return weights / weights.sum(1, keepdims=True)


def timid(predictions, position=3, by=4.0):
    """The same model that never calls a class the likeliest, but ranks patients as before."""
    logits = predictions.logits.copy()
    logits[:, position] -= by
    return with_logits(predictions, logits)


def test_a_threshold_is_the_highest_that_finds_its_share():
    validation, spec = make_classes(seed=1), make_spec()
    points = choose_operating_points(validation, spec, sensitivity=0.9)
    for position, point in enumerate(points):
        score, truth = softmax(validation.logits)[:, position], validation.targets == position
        false_rate, found, thresholds = roc_curve(truth, score, drop_intermediate=False)
        first = int(np.argmax(found >= 0.9))
        assert point.threshold == pytest.approx(thresholds[first], rel=1e-12)
        assert point.sensitivity == pytest.approx(found[first])
        assert point.specificity == pytest.approx(1 - false_rate[first])
        assert point.num_positives == truth.sum()


def test_an_exact_share_needs_no_further_image():
    logits = np.arange(10, dtype=np.float32)[:, None]
    validation = Predictions(logits=logits, targets=np.ones(10, int), groups=tuple("abcdefghij"))
    spec = make_spec(labels="binary", class_counts=(5, 5))
    (point,) = choose_operating_points(validation, spec, sensitivity=0.7)
    assert (point.class_name, point.sensitivity, point.specificity) == ("Class 1", 0.7, None)


def test_a_class_without_validation_images_has_no_point():
    validation = make_classes(per_class=(10, 10, 10, 0))
    points = choose_operating_points(validation, make_spec(), sensitivity=0.9)
    assert [point.threshold is None for point in points] == [False, False, False, True]
    assert set(thresholds_of(points, make_spec())) == {"class_0", "class_1", "class_2"}


def test_masks_and_broken_outputs_have_none():
    spec = make_spec(task="segmentation", labels="binary", class_counts=(9, 1))
    assert choose_operating_points(make_masks(), spec, sensitivity=0.9) == ()
    broken = with_logits(make_classes(), np.full((1000, 4), np.nan))
    assert choose_operating_points(broken, make_spec(), sensitivity=0.9) == ()


@pytest.mark.parametrize("labels", ["multiclass", "multilabel"])
def test_scores_at_a_point_are_those_of_its_confusion_matrix(labels):
    predictions, spec = make_classes(per_class=(30, 30, 30, 10)), make_spec(labels=labels)
    probability = softmax(predictions.logits)
    if labels == "multilabel":
        targets = np.eye(4, dtype=np.int64)[predictions.targets]
        predictions = Predictions(
            logits=predictions.logits, targets=targets, groups=predictions.groups
        )
        probability = 1 / (1 + np.exp(-predictions.logits.astype(np.float64)))
    thresholds = {"class_1": 0.3, "class_3": 0.2}
    statistics = point_statistics(predictions, spec, thresholds)
    weights = group_of(predictions).double()[None] * 0 + 1
    for position, (key, threshold) in zip((1, 3), thresholds.items(), strict=True):
        truth = np.repeat(np.arange(4), (30, 30, 30, 10)) == position
        tn, fp, fn, tp = confusion_matrix(truth, probability[:, position] >= threshold).ravel()
        for name, expected in (("sensitivity", tp / (tp + fn)), ("specificity", tn / (tn + fp))):
            assert float(statistics[f"{name}_at_point/{key}"](weights)) == pytest.approx(expected)
    assert len(statistics) == 4


def test_a_class_that_is_never_the_likeliest_is_still_lost_at_its_operating_point():
    spec, before = make_spec(), timid(make_classes(seed=0))
    points = choose_operating_points(timid(make_classes(seed=1)), spec, sensitivity=0.9)
    after = before.logits.copy()
    after[:, 3] = np.random.default_rng(5).normal(size=len(after))
    report = compare_models(
        before, with_logits(before, after - 4 * np.eye(4)[3]), spec, MARGINS,
        operating_points=points,
    )  # fmt: skip
    items = items_of(report)
    assert items["safety/sensitivity_drop/class_3"].verdict != "FAIL"
    at_point = items["safety/sensitivity_at_point_drop/class_3"]
    assert at_point.baseline == pytest.approx(0.9, abs=0.1)
    assert at_point.verdict == report.verdict == "FAIL"
    assert report.operating_points == points


def test_specificity_at_a_point_is_shown_and_judged_where_it_has_a_margin():
    spec, predictions = make_spec(), make_classes()
    points = choose_operating_points(make_classes(seed=1), spec, sensitivity=0.9)
    name = "safety/specificity_at_point_drop/class_3"
    eager = predictions.logits.copy()
    eager[:, 3] += 3
    args = (predictions, with_logits(predictions, eager), spec)
    report = compare_models(*args, MARGINS, operating_points=points)
    (shown,) = [loss for loss in report.shown if loss.name == name]
    assert shown.difference > 0.1
    margins = SafetyMargins(num_resamples=1000, specificity_drop=0.05)
    judged = items_of(compare_models(*args, margins, operating_points=points))[name]
    assert judged.verdict == "FAIL"


def test_rare_classes_are_named_with_their_prevalence():
    predictions = make_classes()
    report = compare_models(predictions, predictions, make_spec(), MARGINS)
    (rare,) = report.rare_classes
    assert (rare.name, rare.test_count) == ("Class 3", 100)
    assert rare.prevalence == pytest.approx(20 / 1220)
    many = SafetyMargins(num_resamples=1000, rare_prevalence=0.3)
    report = compare_models(predictions, predictions, make_spec(), many)
    assert [each.name for each in report.rare_classes] == ["Class 3", "Class 2"]


def test_of_several_labels_an_image_counts_once():
    predictions = make_classes(per_class=(4, 4, 4, 4))
    targets = np.ones((16, 4), dtype=np.int64)
    targets[:, 3] = np.arange(16) < 1
    both = Predictions(logits=predictions.logits, targets=targets, groups=predictions.groups)
    spec = make_spec(labels="multilabel", class_counts=())
    spec = type(spec)(**{**vars(spec), "class_names": tuple("abcd"), "num_classes": 4})
    report = compare_models(both, both, spec, MARGINS)
    assert [(each.name, each.prevalence) for each in report.rare_classes] == [("d", 1 / 16)]


@pytest.mark.parametrize("name", ["operating_sensitivity", "rare_prevalence"])
@pytest.mark.parametrize("value", [0, 1.01])
def test_a_share_is_above_0_and_at_most_1(name, value):
    with pytest.raises(ConfigError, match=rf"safety\.{name}: {value:g} is not in \(0, 1\]"):
        check_margins(SafetyMargins(**{name: value}))
