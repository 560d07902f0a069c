import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
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
from medlite.safety.statistics import holm, mcnemar_p_value, paired_bootstrap
from medlite.safety_settings import SafetyMargins
from medlite.types import Predictions


def test_an_identical_model_passes():
    predictions = make_classes(per_class=(5, 5, 5, 1))
    report = compare_models(predictions, predictions, make_spec(), MARGINS)
    assert report.verdict == "PASS"
    assert {item.note for item in report.items} == {"the outputs are identical"}
    assert report.flips.changed == 0


def test_a_harmless_change_passes_where_there_are_enough_patients():
    predictions = make_classes()
    report = compare_models(predictions, slightly_changed(predictions), make_spec(), MARGINS)
    assert {item.verdict for item in report.items} == {"PASS"}
    assert report.verdict == "PASS"


def test_one_rare_class_broken_while_the_auc_stays_fails():
    predictions = make_classes()
    broken = predictions.logits.copy()
    broken[:, 3] -= 3
    report = compare_models(predictions, with_logits(predictions, broken), make_spec(), MARGINS)
    items = items_of(report)
    assert items["safety/metric_drop"].difference == pytest.approx(0, abs=0.03)
    assert items["safety/sensitivity_drop/class_3"].verdict == "FAIL"
    assert items["safety/sensitivity_drop/class_0"].verdict == "PASS"
    assert report.verdict == "FAIL"
    assert report.rarest_class.name == "Class 3"
    assert (report.rarest_class.train_count, report.rarest_class.test_count) == (20, 100)


def test_few_patients_of_a_class_are_inconclusive_even_if_none_is_lost():
    predictions = make_classes(per_class=(300, 300, 300, 6), skill=6)
    report = compare_models(predictions, slightly_changed(predictions), make_spec(), MARGINS)
    item = items_of(report)["safety/sensitivity_drop/class_3"]
    assert item.difference == 0
    assert item.verdict == report.verdict == "INCONCLUSIVE"
    assert item.note == "needs n >= 73 to pass; has 6 patients with this class"
    exact = binomtest(0, 6).proportion_ci(confidence_level=0.95, method="exact").high
    assert item.interval == pytest.approx((-3.8415 / 9.8415, exact), rel=1e-4)


def test_few_patients_never_pass_the_task_metric():
    predictions = make_classes(per_class=(5, 5, 5, 2))
    report = compare_models(predictions, slightly_changed(predictions), make_spec(), MARGINS)
    item = items_of(report)["safety/metric_drop"]
    assert item.verdict == "INCONCLUSIVE"
    assert item.note == "needs n >= 20 to pass; has 2 patients behind the rarest class"


def test_a_single_lost_patient_is_no_proof_of_harm():
    predictions = make_classes(per_class=(300, 300, 300, 1), skill=9)
    broken = predictions.logits.copy()
    broken[-1] = (9, 0, 0, -9)
    report = compare_models(predictions, with_logits(predictions, broken), make_spec(), MARGINS)
    item = items_of(report)["safety/sensitivity_drop/class_3"]
    assert item.difference == 1
    assert item.verdict == "INCONCLUSIVE"


def test_a_class_without_test_patients_is_inconclusive():
    predictions = make_classes(per_class=(100, 100, 100, 0))
    report = compare_models(predictions, slightly_changed(predictions), make_spec(), MARGINS)
    item = items_of(report)["safety/sensitivity_drop/class_3"]
    assert (item.baseline, item.verdict) == (None, "INCONCLUSIVE")
    assert item.note == ("not defined on this split (0 patients with this class); needs n >= 73")


def test_overconfidence_alone_fails_the_calibration():
    predictions = make_classes(skill=1)
    overconfident = with_logits(predictions, 8 * predictions.logits)
    report = compare_models(predictions, overconfident, make_spec(), MARGINS)
    items = items_of(report)
    assert items["safety/ece_increase"].verdict == "FAIL"
    assert items["safety/nll_increase"].verdict == "FAIL"
    assert items["safety/sensitivity_drop/class_0"].verdict == "PASS"


def test_outputs_that_are_not_finite_fail():
    predictions = make_classes()
    broken = predictions.logits.copy()
    broken[4, 0] = np.nan
    report = compare_models(predictions, with_logits(predictions, broken), make_spec(), MARGINS)
    assert report.verdict == "FAIL"
    assert report.items[0].note == (
        "outputs are not finite: of the compressed model for 1, of the uncompressed one for 0 of "
        "1000 images"
    )


def test_a_segmentation_that_loses_foreground_fails_on_dice_and_sensitivity():
    predictions = make_masks()
    spec = make_spec("segmentation", "binary", (9000, 500))
    report = compare_models(
        predictions, with_logits(predictions, predictions.logits - 2), spec, MARGINS
    )
    items = items_of(report)
    assert items["safety/metric_drop"].verdict == "FAIL"
    assert items["safety/sensitivity_drop/class_1"].verdict == "FAIL"
    assert "safety/sensitivity_drop/class_0" not in items
    assert report.num_groups == 20
    assert report.flips.unit == "pixels"
    assert report.flips.mcnemar_p is None


def test_several_images_of_a_patient_are_no_independent_flips():
    predictions = make_classes()
    grouped = replace(predictions, groups=tuple(f"p{i // 2}" for i in range(1000)))
    changed = slightly_changed(predictions, size=1.0)
    assert compare_models(predictions, changed, make_spec(), MARGINS).flips.mcnemar_p is not None
    changed = replace(changed, groups=grouped.groups)
    assert compare_models(grouped, changed, make_spec(), MARGINS).flips.mcnemar_p is None


def test_a_segmentation_that_hardly_changes_passes():
    predictions = make_masks()
    spec = make_spec("segmentation", "binary", (9000, 500))
    report = compare_models(predictions, slightly_changed(predictions), spec, MARGINS)
    assert report.verdict == "PASS"


def test_flips_count_what_broke_and_what_was_mended():
    predictions = make_classes(per_class=(3, 3), skill=9)
    changed = predictions.logits.copy()
    changed[0] = changed[0][::-1]
    worse = compare_models(
        predictions, with_logits(predictions, changed), make_spec(class_counts=(9, 9)), MARGINS
    ).flips
    assert (worse.total, worse.changed, worse.broken, worse.mended) == (6, 1, 1, 0)
    better = compare_models(
        with_logits(predictions, changed), predictions, make_spec(class_counts=(9, 9)), MARGINS
    ).flips
    assert (better.broken, better.mended) == (0, 1)


def test_the_bootstrap_pairs_models_and_resamples_patients():
    first, second = make_masks(), slightly_changed(make_masks(), size=1.0)
    spec = make_spec("segmentation", "binary", (9000, 500))
    pair = paired_bootstrap(
        grouped_scores(first, spec).statistics,
        grouped_scores(second, spec).statistics,
        higher_is_better={"dice": True},
        num_groups=20,
        num_resamples=300,
        seed=3,
    )["dice"]
    generator = np.random.default_rng(3)
    expected = []
    names = sorted(set(first.groups))
    for _ in range(3):
        drawn = generator.integers(20, size=(100, 20))
        for patients in drawn:
            where = [i for p in patients for i, g in enumerate(first.groups) if g == names[p]]
            expected.append(pooled_dice(first, where) - pooled_dice(second, where))
    np.testing.assert_allclose(pair.samples, expected, atol=1e-12)
    assert pair.loss == pytest.approx(pair.first - pair.second)
    assert pair.first == pytest.approx(pooled_dice(first, range(40)))


def pooled_dice(predictions, where):
    decided = predictions.logits[list(where), 0] > 0
    truth = predictions.targets[list(where)] == 1
    return 2 * (decided & truth).sum() / (decided.sum() + truth.sum())


def test_the_metric_drop_of_a_binary_classifier_is_its_loss_of_auc():
    generator = np.random.default_rng(0)
    targets = generator.integers(2, size=80)
    logits = (targets + generator.normal(size=80))[:, None].astype(np.float32)
    before = Predictions(logits=logits, targets=targets, groups=tuple(map(str, range(80))))
    after = slightly_changed(before, size=0.5)
    spec = make_spec(labels="binary", class_counts=(50, 30))
    item = items_of(compare_models(before, after, spec, MARGINS))["safety/metric_drop"]
    expected = roc_auc_score(targets, logits[:, 0]) - roc_auc_score(targets, after.logits[:, 0])
    assert item.difference == pytest.approx(expected)


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar_p_value(3, 11) == pytest.approx(binomtest(3, 14).pvalue)
    assert mcnemar_p_value(0, 0) == 1
    assert mcnemar_p_value(4, 4) == 1


def test_holm_multiplies_by_what_is_left_and_never_decreases():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


def test_the_report_is_plain_json_and_repeats_itself():
    predictions = make_classes(per_class=(20, 20, 20, 0))
    changed = slightly_changed(predictions, size=0.5)
    texts = [
        json.dumps(
            compare_models(predictions, changed, make_spec(), MARGINS).to_json(), allow_nan=False
        )
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert '"p0"' not in texts[0]


@pytest.mark.parametrize(
    ("margins", "text"),
    [
        (SafetyMargins(metric_drop=0), "safety.metric_drop: 0 is not above 0"),
        (SafetyMargins(sensitivity_drop=1.5), "safety.sensitivity_drop: 1.5 is not below 1"),
        (SafetyMargins(num_resamples=10), "safety.num_resamples: 10 is below 500"),
    ],
)
def test_margins_that_nothing_can_meet_are_refused(margins, text):
    predictions = make_classes(per_class=(2, 2, 2, 2))
    with pytest.raises(ConfigError, match=text):
        compare_models(predictions, predictions, make_spec(), margins)
