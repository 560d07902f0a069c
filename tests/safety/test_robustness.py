import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_safety_gate import make_spec

from medlite.errors import ConfigError
from medlite.metrics.evaluate import evaluate
from medlite.safety.corruptions import SUITES, corrupt
from medlite.safety.robustness import (
    CLEAN,
    check_settings,
    compare_robustness,
    conditions_of,
    robustness_measurements,
    task_statistic,
)
from medlite.safety_settings import RobustnessSettings, SafetyMargins
from medlite.types import Predictions

MARGINS = SafetyMargins(num_resamples=500)
SPEC = make_spec(task="segmentation", labels="binary", class_counts=(900, 100))
GROUPS = tuple(f"p{i}" for i in range(40))
CONDITIONS = [(n, s) for n in ("gaussian_noise", "contrast", "intensity_shift") for s in (1, 3, 5)]


def make_images(seed=0):
    """Bright discs on dark ground, with masks."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:32, :32]
    images, masks = [], []
    for _ in GROUPS:
        centre, radius = random.uniform(10, 22, 2), random.uniform(4, 8)
        mask = np.hypot(rows - centre[0], columns - centre[1]) < radius
        images.append(0.8 * (2 * mask - 1) + random.normal(0, 0.05, mask.shape))
        masks.append(mask)
    return np.float32(images)[:, None], np.int64(masks)


def careful(images):
    """A smoothing threshold between the two levels of each image."""
    tensor = torch.from_numpy(images)
    smooth = torch.nn.functional.avg_pool2d(tensor, 3, stride=1, padding=1, count_include_pad=False)
    middle = (smooth.amax((1, 2, 3), keepdim=True) + smooth.amin((1, 2, 3), keepdim=True)) / 2
    return (smooth - middle).numpy()


def bad_in_noise(images):
    """The same on calm images; where neighbours differ much it misses all but the brightest."""
    is_noisy = np.abs(np.diff(images, axis=3))[..., :4, :].mean((1, 2, 3)) > 0.15
    return np.where(is_noisy[:, None, None, None], images - 0.9, careful(images))


def score(model, conditions=CONDITIONS):
    images, masks = make_images()
    scores = {}
    for name, severity in [CLEAN, *conditions]:
        corrupted = [
            corrupt(image, mask, name=name, severity=severity, position=p, value_range=(-1, 1))
            for p, (image, mask) in enumerate(zip(images, masks, strict=True))
        ]
        logits = model(np.stack([image for image, _ in corrupted]))
        targets = np.stack([mask for _, mask in corrupted])
        said = Predictions(logits=np.float32(logits), targets=targets, groups=GROUPS)
        scores[name, severity] = task_statistic(said, SPEC)
    return scores


def compare(baseline, compressed, **changed):
    return compare_robustness(
        None if baseline is None else score(baseline), score(compressed),
        **{"groups": GROUPS, "spec": SPEC, "margins": MARGINS, **changed},
    )  # fmt: skip


def verdicts(report):
    return {item.name.removeprefix("robustness/"): item.verdict for item in report.items}


def test_two_identical_models_degrade_alike():
    report = compare(careful, careful)
    assert set(verdicts(report).values()) == {"PASS"}
    assert {row.difference for row in report.rows} == {0}
    assert {row.interval for row in report.rows} == {(0, 0)}


def test_a_compressed_model_that_is_worse_under_noise_alone_is_found():
    report = compare(careful, bad_in_noise)
    assert report.clean_baseline == report.clean_compressed
    assert verdicts(report) == {
        "clean": "PASS", "gaussian_noise": "FAIL", "contrast": "PASS", "intensity_shift": "PASS"
    }  # fmt: skip
    worst = next(r for r in report.rows if (r.corruption, r.severity) == ("gaussian_noise", 5))
    assert worst.interval[0] > 0
    assert report.verdict == "FAIL"


def test_another_preprocessing_at_deployment_is_told_on_clean_images_already():
    def fixed(images):
        return images

    def shifted(images):
        return images + 0.9

    report = compare(fixed, shifted)
    assert verdicts(report)["clean"] == "FAIL"
    assert report.clean_compressed < report.clean_baseline - 0.1


def test_a_model_that_a_shift_of_intensity_breaks_is_found():
    def fixed(images):
        return images - 0.35

    report = compare(careful, fixed)
    assert verdicts(report)["clean"] == "PASS"
    assert verdicts(report)["intensity_shift"] == verdicts(report)["contrast"] == "FAIL"


def test_values_are_those_of_the_task_metric_and_their_shares():
    report = compare(careful, bad_in_noise)
    for row in report.rows:
        lost = 1 - row.compressed / report.clean_compressed
        assert row.compressed_degradation == pytest.approx(lost)
        before = 1 - row.baseline / report.clean_baseline
        assert row.difference == pytest.approx(lost - before)


def test_the_interval_is_that_of_a_loop_over_resamples():
    baseline, compressed = score(careful), score(bad_in_noise)
    report = compare(careful, bad_in_noise, seed=5)
    condition, random, samples = ("gaussian_noise", 5), np.random.default_rng(99), []
    for _ in range(500):
        drawn = np.bincount(random.integers(40, size=40), minlength=40)
        weights = torch.from_numpy(drawn)[None].double()
        lost = [1 - s[condition](weights) / s[CLEAN](weights) for s in (baseline, compressed)]
        samples.append(float(lost[1] - lost[0]))
    row = next(r for r in report.rows if (r.corruption, r.severity) == condition)
    assert row.interval == pytest.approx(np.quantile(samples, (0.025, 0.975)), abs=0.01)


@pytest.mark.parametrize("labels", ["binary", "multiclass", "multilabel"])
def test_the_statistic_is_the_evaluated_metric_of_classes(labels):
    spec = make_spec(labels=labels, class_counts=(50, 50) if labels == "binary" else (50, 30, 20))
    random = np.random.default_rng(0)
    shape = (60, spec.num_classes) if labels == "multilabel" else (60,)
    targets = random.integers(2 if labels != "multiclass" else 3, size=shape)
    logits = random.normal(size=(60, spec.num_classes)).astype(np.float32)
    said = Predictions(logits=logits, targets=targets, groups=tuple(map(str, range(60))))
    value = float(task_statistic(said, spec)(torch.ones(1, 60).double()))
    expected = {m.name: m.value for m in evaluate(said, spec)}["test/auc"]
    assert value == pytest.approx(expected)
    if labels == "binary":
        assert value == pytest.approx(roc_auc_score(targets, logits[:, 0]))


def test_outputs_that_are_not_finite_pass_nothing():
    report = compare(careful, lambda images: np.full_like(images, np.nan))
    assert "PASS" not in verdicts(report).values()
    assert {row.compressed for row in report.rows} == {None}
    json.dumps(report.to_json(), allow_nan=False)


def test_a_model_that_breaks_off_under_one_corruption_fails_there():
    def breaks_in_noise(images):
        said, tolerated = careful(images), bad_in_noise(images)
        return said if (said == tolerated).all() else np.full_like(said, np.nan)

    report = compare(careful, breaks_in_noise)
    found = verdicts(report)
    assert found["gaussian_noise"] == "FAIL"
    assert found["clean"] == "PASS"


def test_a_score_is_as_sure_as_the_rarest_class_behind_it():
    report = compare(careful, careful, num_groups_behind=7)
    assert set(verdicts(report).values()) == {"INCONCLUSIVE"}
    note = "needs n >= 20 to pass; has 7 patients behind the rarest class"
    assert report.items[0].note == note


def test_few_patients_pass_nothing():
    groups = tuple(f"p{i % 9}" for i in range(40))

    def grouped(model):
        images, masks = make_images()
        said = Predictions(logits=model(images), targets=masks, groups=groups)
        return {CLEAN: task_statistic(said, SPEC), ("blur", 1): task_statistic(said, SPEC)}

    report = compare_robustness(
        grouped(careful), grouped(careful), groups=groups, spec=SPEC, margins=MARGINS
    )
    assert set(verdicts(report).values()) == {"INCONCLUSIVE"}
    assert report.items[0].note == "needs n >= 20 to pass; has 9 patients"


def test_a_model_without_a_baseline_is_described_and_not_judged():
    report = compare(None, careful)
    assert (report.items, report.verdict, report.clean_baseline) == ((), None, None)
    assert all(row.baseline is None and row.difference is None for row in report.rows)
    names = {m.name for m in robustness_measurements("onnxruntime", report.to_json())}
    assert names == {
        f"robustness/onnxruntime/{corruption}/{severity}/{score}"
        for corruption, severity in CONDITIONS
        for score in ("dice", "degradation")
    }


def test_measurements_stand_under_flat_keys():
    report = compare(careful, bad_in_noise).to_json()
    found = {m.name: m for m in robustness_measurements("openvino", report)}
    extra = found["robustness/openvino/gaussian_noise/5/extra_degradation"]
    assert extra.value == pytest.approx(
        found["robustness/openvino/gaussian_noise/5/degradation"].value
        - found["baseline/robustness/openvino/gaussian_noise/5/degradation"].value
    )
    assert extra.spread[0] < extra.value < extra.spread[1]
    assert (extra.n, extra.higher_is_better) == (40, False)


def test_auto_takes_the_suite_of_the_modality_and_a_list_itself():
    automatic = conditions_of(RobustnessSettings(), "mr")
    assert automatic == [(name, s) for name in SUITES["mr"] for s in (1, 3, 5)]
    chosen = RobustnessSettings(corruptions=["jpeg"], severities=[4, 2, 2])
    assert conditions_of(chosen, "mr") == [("jpeg", 2), ("jpeg", 4)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"corruptions": ["blurr"]}, "robustness.corruptions: 'blurr', did you mean 'blur'?"),
        ({"corruptions": "blur"}, "'blur' is neither auto nor a list such as"),
        ({"severities": [0, 6]}, r"robustness.severities: \[0, 6\] are not all of 1 to 5"),
        ({"severities": []}, "nothing to do; say robustness.enabled=false instead"),
        ({"corruptions": []}, "nothing to do; say robustness.enabled=false instead"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changed, words):
    with pytest.raises(ConfigError, match=words):
        check_settings(RobustnessSettings(**changed))
