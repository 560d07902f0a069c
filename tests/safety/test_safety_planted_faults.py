"""What compression can break without anybody seeing it in an average: the gate must."""

import numpy as np
from sklearn.metrics import roc_auc_score
from toy_predictions import (
    items_of,
    make_classes,
    make_masks,
    make_spec,
    slightly_changed,
    with_logits,
)

from medlite.safety.gate import compare_models
from medlite.safety_settings import SafetyMargins

DEFAULT = SafetyMargins()


def macro_auc(predictions):
    odds = np.exp(predictions.logits.astype(np.float64))
    return roc_auc_score(predictions.targets, odds / odds.sum(1, keepdims=True), multi_class="ovr")


def test_a_rare_class_that_broke_while_the_macro_auc_stays_is_caught():
    predictions = make_classes(per_class=(400, 400, 400, 60), skill=4)
    logits = predictions.logits.copy()
    logits[:, 3] -= 5
    broken = with_logits(predictions, logits)
    assert abs(macro_auc(predictions) - macro_auc(broken)) < 0.01
    report = compare_models(predictions, broken, make_spec(), DEFAULT)
    items = items_of(report)
    assert items["safety/metric_drop"].verdict == "PASS"
    assert items["safety/sensitivity_drop/class_3"].verdict == "FAIL"
    assert [items[f"safety/sensitivity_drop/class_{k}"].verdict for k in range(3)] == ["PASS"] * 3
    assert (report.verdict, report.rarest_class.name) == ("FAIL", "Class 3")


def test_overconfidence_with_equal_decisions_is_caught():
    predictions = make_classes(per_class=(300, 300, 300, 300), skill=1.5)
    report = compare_models(
        predictions, with_logits(predictions, 4 * predictions.logits), make_spec(), DEFAULT
    )
    items = items_of(report)
    assert report.flips.changed == 0
    assert items["safety/sensitivity_drop/class_0"].difference == 0
    assert items["safety/ece_increase"].verdict == "FAIL"
    assert items["safety/nll_increase"].verdict == "FAIL"
    shown = {loss.name: loss for loss in report.shown}
    for name in ("ece_adaptive_increase", "ece_classwise_increase", "brier_increase"):
        assert shown[f"safety/{name}"].interval[0] > 0
    assert shown["safety/accuracy_drop"].difference == 0


def test_twelve_patients_are_inconclusive_and_told_how_many_it_takes():
    predictions = make_classes(per_class=(3, 3, 3, 3), skill=9)
    report = compare_models(predictions, slightly_changed(predictions), make_spec(), DEFAULT)
    items = items_of(report)
    assert report.num_groups == 12
    assert {item.verdict for item in report.items} == {"INCONCLUSIVE"}
    assert (
        items["safety/metric_drop"].note
        == "needs n >= 20 to pass; has 3 patients behind the rarest class"
    )
    note = "needs n >= 73 to pass; has 3 patients with this class"
    assert items["safety/sensitivity_drop/class_0"].note == note


def test_an_identical_pair_passes_with_exactly_zero_differences():
    for predictions, spec in (
        (make_classes(per_class=(5, 4, 3, 0)), make_spec()),
        (make_masks(num_images=6), make_spec("segmentation", "binary", (9, 9))),
    ):
        twin = with_logits(predictions, predictions.logits.copy())
        report = compare_models(predictions, twin, spec, DEFAULT)
        assert report.verdict == "PASS"
        differences = {loss.difference for loss in (*report.items, *report.shown)}
        intervals = {loss.interval for loss in (*report.items, *report.shown)}
        assert (differences, intervals) == ({0.0}, {(0.0, 0.0)})
        assert report.flips.changed == 0
