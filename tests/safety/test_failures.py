import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score
from test_safety_gate import make_classes, make_spec, slightly_changed, with_logits

from medlite.safety.failures import find_failures, image_losses, quality_groups, size_groups
from medlite.types import Predictions

MASKS = make_spec(task="segmentation", labels="binary", class_counts=(900, 100))


def make_masks(num_samples=60, seed=0):
    """Squares of sides 1 to 6 in images of 8 x 8, found without fault."""
    masks = np.zeros((num_samples, 8, 8), np.int64)
    for position in range(num_samples):
        side = 1 + position % 6
        masks[position, :side, :side] = 1
    logits = np.float32(2 * masks - 1)[:, None]
    return Predictions(
        logits=logits, targets=masks, groups=tuple(f"p{i // 2}" for i in range(num_samples))
    )


def groups_of(report):
    return {group.name: group for group in report.groups}


def test_the_loss_of_a_class_is_minus_its_log_probability():
    predictions = make_classes(per_class=(5, 5, 5, 5))
    logits = predictions.logits.astype(float)
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(share[np.arange(20), predictions.targets])
    assert image_losses(predictions, make_spec()) == pytest.approx(expected)


def test_the_loss_of_a_mask_is_its_missing_dice():
    predictions = make_masks()
    noise = np.random.default_rng(0).normal(0, 1, predictions.logits.shape)
    noisy = with_logits(predictions, predictions.logits + noise)
    expected = [
        1 - f1_score(mask.ravel(), logit.ravel() > 0)
        for mask, logit in zip(noisy.targets, noisy.logits, strict=True)
    ]
    assert image_losses(noisy, MASKS) == pytest.approx(np.array(expected))


def test_the_worst_cases_by_loss_and_by_change_are_found():
    before = make_classes(per_class=(50, 50, 50, 50))
    logits = before.logits.copy()
    logits[7, 0] -= 9
    logits[9, 0] -= 7
    report = find_failures(before, with_logits(before, logits), make_spec())
    assert [case.position for case in report.changed] == [7, 9]
    assert report.changed[0].after - report.changed[0].before > 3
    changes = image_losses(with_logits(before, logits), make_spec()) - image_losses(
        before, make_spec()
    )
    assert report.changed[0].after - report.changed[0].before == pytest.approx(changes[7])
    losses = image_losses(with_logits(before, logits), make_spec())
    assert [c.position for c in report.worst] == np.argsort(-losses, kind="stable")[:12].tolist()


def test_an_image_that_always_failed_is_no_change():
    before = make_classes(per_class=(50, 50, 50, 50))
    before.logits[20, 0] -= 30
    logits = before.logits.copy()
    logits[20, 0] -= 0.1
    logits[7, 0] -= 9
    report = find_failures(before, with_logits(before, logits), make_spec())
    assert [case.position for case in report.changed] == [7, 20]
    assert report.worst[0].position == 20


def test_a_class_that_compression_broke_stands_out():
    before = make_classes(per_class=(100, 100, 100, 20))
    broken = before.logits.copy()
    broken[:, 3] -= 4
    report = find_failures(before, with_logits(before, broken), make_spec())
    rare = groups_of(report)["Class 3"]
    assert (rare.num_images, report.num_worst) == (20, 32)
    assert rare.num_worst >= 18
    assert rare.interval[0] > 1
    assert groups_of(report)["Class 0"].interval[1] < 0.1
    assert rare.change == pytest.approx(rare.after - rare.before)


def test_small_lesions_that_compression_lost_stand_out():
    before = make_masks()
    lost = before.logits.copy()
    area = before.targets.sum((1, 2))
    lost[area <= 4] = -1
    report = find_failures(before, with_logits(before, lost), MASKS)
    small, medium, large = (g for g in report.groups if g.kind == "foreground")
    assert small.name == "small: up to 6.25% of the image"
    assert (small.num_images, small.change, small.num_worst) == (20, 1, report.num_worst)
    assert medium.change == large.change == 0
    assert small.interval == (1, 1)


def test_every_mask_with_foreground_is_in_one_size():
    masks = make_masks().targets
    masks[3] = 0
    members = np.stack(list(size_groups(masks, MASKS).values()))
    assert members.sum(0).tolist() == [0 if p == 3 else 1 for p in range(60)]
    assert size_groups(np.zeros_like(masks), MASKS) == {}


def test_a_mask_without_foreground_has_no_loss_and_is_no_case():
    before = make_masks()
    before.targets[3] = 0
    report = find_failures(before, slightly_changed(before), MASKS)
    assert report.num_images == 59
    assert 3 not in [case.position for case in report.worst]


def test_without_a_baseline_the_worst_cases_remain():
    predictions = make_classes(per_class=(30, 30, 30, 30))
    report = find_failures(None, predictions, make_spec())
    assert report.changed == ()
    assert {group.change for group in report.groups} == {None}
    assert len(report.worst) == 12
    json.dumps(report.to_json(), allow_nan=False)


def test_identical_models_changed_no_case():
    predictions = make_classes()
    report = find_failures(predictions, predictions, make_spec())
    assert report.changed == ()
    assert {group.interval for group in report.groups} == {(0, 0)}


def test_outputs_that_are_not_finite_are_left_to_the_gate():
    predictions = make_classes()
    broken = replace(predictions, logits=np.full_like(predictions.logits, np.inf))
    assert find_failures(predictions, broken, make_spec()) is None


def test_images_are_grouped_by_thirds_of_their_quality():
    before = make_classes(per_class=(30, 30, 30, 30))
    noise = np.random.default_rng(0).permutation(120).astype(float)
    logits = before.logits.copy()
    is_noisy = noise >= 80
    logits[is_noisy] = -logits[is_noisy]  # compression made the noisy images worse
    report = find_failures(
        before, with_logits(before, logits), make_spec(), qualities={"noise": noise}
    )
    groups = {group.name: group for group in report.groups if group.kind == "noise"}
    assert list(groups) == ["low: up to 39", "middle: 39 to 79", "high: over 79"]
    assert [group.num_images for group in groups.values()] == [40, 40, 40]
    assert groups["high: over 79"].interval[0] > 0.5
    assert groups["low: up to 39"].change == 0


def test_images_are_grouped_by_source_where_it_is_known():
    before = make_classes(per_class=(6, 6, 6, 6))
    sources = ["site A", "site B", None] * 8
    report = find_failures(before, before, make_spec(), sources=sources)
    groups = {group.name: group for group in report.groups if group.kind == "source"}
    assert {name: group.num_images for name, group in groups.items()} == {"site A": 8, "site B": 8}
    losses = image_losses(before, make_spec())
    assert groups["site B"].after == pytest.approx(losses[1::3].mean())


def test_a_quality_that_all_images_share_makes_no_groups():
    assert quality_groups({"noise": np.ones(9)}) == {}
