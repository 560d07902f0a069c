import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score
from toy_predictions import (
    MARGINS,
    items_of,
    make_classes,
    make_masks,
    make_spec,
    slightly_changed,
    with_logits,
)

from medlite.errors import ConfigError
from medlite.metrics.statistics import grouped_scores
from medlite.safety.gate import compare_models
from medlite.safety.statistics import paired_bootstrap
from medlite.safety_settings import SafetyMargins
from medlite.types import Predictions


def shown_of(report):
    return {loss.name: loss for loss in report.shown}


def probabilities_of(predictions):
    odds = np.exp(predictions.logits.astype(np.float64))
    return odds / odds.sum(1, keepdims=True)


def test_scores_without_a_margin_are_shown_and_decide_nothing():
    predictions = make_classes(per_class=(400, 400, 400, 400), skill=3)
    changed = predictions.logits.copy()
    changed[:, 0] += 0.7
    report = compare_models(predictions, with_logits(predictions, changed), make_spec(), MARGINS)
    shown = shown_of(report)
    assert {
        "safety/specificity_drop/class_0", "safety/auc_drop/class_3", "safety/ap_drop",
        "safety/ap_drop/class_3", "safety/accuracy_drop", "safety/brier_increase",
        "safety/ece_adaptive_increase", "safety/ece_classwise_increase",
    } <= set(shown)  # fmt: skip
    assert shown["safety/specificity_drop/class_0"].interval[0] > 0
    assert not any("specificity" in item.name for item in report.items)


def test_a_shown_loss_is_the_difference_of_the_scores_of_scikit_learn():
    predictions = make_classes(per_class=(60, 60, 60, 20))
    changed = slightly_changed(predictions, size=0.8)
    shown = shown_of(compare_models(predictions, changed, make_spec(), MARGINS))
    before, after = (
        average_precision_score(predictions.targets == 3, probabilities_of(side)[:, 3])
        for side in (predictions, changed)
    )
    loss = shown["safety/ap_drop/class_3"]
    assert (loss.baseline, loss.compressed) == pytest.approx((before, after))
    assert loss.difference == pytest.approx(before - after)
    assert loss.interval[0] < loss.difference < loss.interval[1]


def test_a_margin_makes_a_shown_score_judged():
    predictions = make_classes(per_class=(400, 400, 400, 400), skill=3)
    changed = predictions.logits.copy()
    changed[:, 0] += 2.5
    margins = replace(MARGINS, specificity_drop=0.02, class_score_drop=0.05, brier_increase=0.5)
    report = compare_models(predictions, with_logits(predictions, changed), make_spec(), margins)
    items = items_of(report)
    assert items["safety/specificity_drop/class_0"].verdict == "FAIL"
    assert items["safety/specificity_drop/class_1"].verdict == "PASS"
    assert items["safety/auc_drop/class_1"].verdict == "PASS"
    assert items["safety/brier_increase"].verdict == "PASS"
    assert not any(name.startswith("safety/specificity") for name in shown_of(report))


def test_a_specificity_rests_on_the_patients_without_the_class():
    predictions = make_classes(per_class=(0, 300, 4, 0), skill=9)
    spec, margins = make_spec(), replace(MARGINS, specificity_drop=0.05)
    report = compare_models(predictions, slightly_changed(predictions), spec, margins)
    item = items_of(report)["safety/specificity_drop/class_1"]
    assert item.note == "needs n >= 73 to pass; has 4 patients without this class"


def test_areas_of_single_images_have_a_p_value_corrected_over_classes():
    predictions = make_classes(per_class=(60, 60, 60, 20))
    changed = slightly_changed(predictions, size=1.5)
    shown = shown_of(compare_models(predictions, changed, make_spec(), MARGINS))
    p_values = [shown[f"safety/auc_drop/class_{k}"].p_value for k in range(4)]
    assert all(0 < p <= 1 for p in p_values)
    several = replace(predictions, groups=tuple(f"p{i // 2}" for i in range(200)))
    both = replace(changed, groups=several.groups)
    shown = shown_of(compare_models(several, both, make_spec(), MARGINS))
    assert shown["safety/auc_drop/class_0"].p_value is None


def test_each_class_has_exact_and_score_intervals_before_and_after():
    predictions = make_classes(per_class=(50, 50, 50, 7), skill=1)
    report = compare_models(
        predictions, slightly_changed(predictions, size=2), make_spec(), MARGINS
    )
    row = report.class_intervals[3]
    assert (row.name, row.num_groups) == ("Class 3", 7)
    for side in ("baseline", "compressed"):
        hits = round(getattr(row, side) * 7)
        exact, score = (
            binomtest(hits, 7).proportion_ci(method=method) for method in ("exact", "wilson")
        )
        assert getattr(row, f"{side}_exact") == pytest.approx((exact.low, exact.high))
        assert getattr(row, f"{side}_wilson") == pytest.approx((score.low, score.high))


def test_a_class_that_does_not_occur_has_no_intervals():
    predictions = make_classes(per_class=(50, 50, 50, 0))
    report = compare_models(predictions, slightly_changed(predictions), make_spec(), MARGINS)
    assert [row.name for row in report.class_intervals] == ["Class 0", "Class 1", "Class 2"]
    loss = shown_of(report)["safety/auc_drop/class_3"]
    assert (loss.difference, loss.note) == (None, "not defined on this split")


def test_a_segmentation_shows_dice_and_distance_of_each_class():
    predictions = make_masks()
    spec = make_spec("segmentation", "binary", (9000, 500))
    worse = with_logits(predictions, predictions.logits - 1)
    report = compare_models(predictions, worse, spec, MARGINS)
    shown = shown_of(report)
    assert shown["safety/dice_drop/class_1"].difference > 0
    distance = shown["safety/hausdorff95_px_increase/class_1"]
    assert distance.interval[0] < distance.difference < distance.interval[1]
    assert distance.note == "40 of 40 images: outlines on both sides"
    assert report.class_intervals == ()


@pytest.mark.parametrize(
    ("margins", "text"),
    [
        (SafetyMargins(specificity_drop=1.0), "safety.specificity_drop: 1 is not below 1"),
        (SafetyMargins(class_score_drop=0), "safety.class_score_drop: 0 is not above 0"),
        (SafetyMargins(brier_increase=-1), "safety.brier_increase: -1 is not above 0"),
    ],
)
def test_optional_margins_that_nothing_can_meet_are_refused(margins, text):
    predictions = make_classes(per_class=(2, 2, 2, 2))
    with pytest.raises(ConfigError, match=text):
        compare_models(predictions, predictions, make_spec(), margins)


def draw_pair(generator, num_patients):
    """Patients with 1 to 3 images, whose errors go together in patients and in models."""
    sizes = generator.integers(1, 4, size=num_patients)
    patient = np.repeat(np.arange(num_patients), sizes)
    targets = generator.integers(2, size=len(patient))
    shared = generator.normal(size=num_patients)[patient] * 0.7
    sides = []
    for skill in (1.6, 1.2):
        noise = generator.normal(size=len(patient)) * 0.7
        sides.append((skill * (targets - 0.5) + shared + noise)[:, None].astype(np.float32))
    groups = tuple(f"{p:06d}" for p in patient)
    return [Predictions(logits=side, targets=targets, groups=groups) for side in sides]


@pytest.mark.slow
def test_intervals_of_paired_losses_cover_the_truth_as_often_as_they_say():
    spec = make_spec(labels="binary", class_counts=(1, 1))
    names = {"accuracy": True, "auc": True, "brier": False, "nll": False}
    generator = np.random.default_rng(0)
    large = [grouped_scores(side, spec) for side in draw_pair(generator, 60_000)]
    truth = {
        name: (large[0].value(name) - large[1].value(name)) * (1 if is_high else -1)
        for name, is_high in names.items()
    }
    num_trials, hits = 300, dict.fromkeys(names, 0)
    for trial in range(num_trials):
        first, second = (grouped_scores(side, spec) for side in draw_pair(generator, 80))
        paired = paired_bootstrap(
            first.statistics, second.statistics, higher_is_better=names,
            num_groups=80, num_resamples=500, seed=trial,
        )  # fmt: skip
        for name in names:
            low, high = paired[name].interval
            hits[name] += low <= truth[name] <= high
    # 300 trials at 95 % leave a standard error of 1.3 %; percentile intervals are a bit narrow.
    coverage = {name: hit / num_trials for name, hit in hits.items()}
    assert all(0.90 <= share <= 0.985 for share in coverage.values()), coverage
    assert all(math.isfinite(value) for value in truth.values())
