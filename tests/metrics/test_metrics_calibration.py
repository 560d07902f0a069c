import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
)

from medlite.metrics.calibration import (
    Confidences,
    adaptive_calibration_error,
    bin_sums,
    brier_score,
    calibration_error,
    confidences,
    negative_log_likelihood,
    reliability_bins,
)


def random_case(num_classes, seed=0, num_samples=200):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_samples, num_classes, generator=generator).double()
    return logits, torch.randint(max(2, num_classes), (num_samples,), generator=generator)


def error_of(probability, target, **meaning):
    return float(calibration_error(bin_sums(confidences(probability, target, **meaning)).sum(0)))


def test_top_label_error_equals_torchmetrics():
    logits, target = random_case(4)
    probability = logits.softmax(1)
    ours = error_of(probability, target, labels="multiclass", task="classification")
    theirs = multiclass_calibration_error(probability, target, num_classes=4, n_bins=15)
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_binary_error_equals_torchmetrics():
    logits, target = random_case(1)
    ours = error_of(logits.sigmoid(), target, labels="binary", task="classification")
    theirs = binary_calibration_error(logits.sigmoid()[:, 0], target, n_bins=15)
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_segmentation_error_is_the_mean_over_foreground_classes():
    torch.manual_seed(0)
    probability = torch.randn(5, 3, 6, 7).double().softmax(1)
    target = torch.randint(3, (5, 6, 7))
    ours = error_of(probability, target, labels="multiclass", task="segmentation")
    columns = [
        binary_calibration_error(probability[:, k].flatten(), (target == k).flatten(), n_bins=15)
        for k in (1, 2)
    ]
    assert ours == pytest.approx(float(sum(columns)) / 2, abs=1e-6)


def test_multilabel_error_is_the_mean_over_labels():
    torch.manual_seed(0)
    probability, target = torch.rand(50, 3).double(), torch.randint(2, (50, 3)).float()
    ours = error_of(probability, target, labels="multilabel", task="classification")
    columns = [
        binary_calibration_error(probability[:, k], target[:, k].long(), n_bins=15)
        for k in range(3)
    ]
    assert ours == pytest.approx(float(sum(columns)) / 3, abs=1e-6)


def test_bins_of_batches_add_up_to_those_of_the_set():
    logits, target = random_case(1)
    judged = confidences(logits.sigmoid(), target, labels="binary", task="classification")
    halves = [Confidences(c, o) for c, o in zip(*(part.split(70) for part in judged), strict=True)]
    parts = sum(bin_sums(half).sum(0) for half in halves)
    torch.testing.assert_close(parts, bin_sums(judged).sum(0))


def test_adaptive_error_equals_a_loop_over_equal_parts():
    logits, target = random_case(1, num_samples=150)
    probability = logits.sigmoid()
    judged = confidences(probability, target, labels="binary", task="classification")
    pairs = sorted(zip(probability[:, 0].tolist(), target.tolist(), strict=True))
    gaps = [
        abs(np.mean([c for c, _ in pairs[i : i + 10]]) - np.mean([t for _, t in pairs[i : i + 10]]))
        for i in range(0, 150, 10)
    ]
    assert adaptive_calibration_error(judged) == pytest.approx(np.mean(gaps))


def test_the_order_of_equal_confidences_decides_nothing():
    # Calibrated: of each of five confidences, that share is true.
    confidence = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9]).double().repeat_interleave(200)
    outcome = torch.cat([torch.arange(200) < round(200 * c) for c in (0.5, 0.6, 0.7, 0.8, 0.9)])
    for order in (torch.arange(1000), torch.randperm(1000), torch.argsort(outcome.int())):
        judged = Confidences(confidence[order].view(-1, 1, 1), outcome[order].view(-1, 1, 1))
        assert adaptive_calibration_error(judged) < 1e-6


def test_adaptive_error_sees_what_equal_widths_average_away():
    confidence = torch.tensor([0.50, 0.51, 0.52, 0.53]).double().view(4, 1, 1)
    outcome = torch.tensor([True, True, False, False]).view(4, 1, 1)
    judged = Confidences(confidence, outcome)
    assert float(calibration_error(bin_sums(judged, 15).sum(0))) < 0.05
    assert adaptive_calibration_error(judged, 2) > 0.4


def test_likelihood_and_brier_of_classes_equal_scikit_learn():
    logits, target = random_case(4)
    probability = logits.softmax(1)
    nll = negative_log_likelihood(logits, target, labels="multiclass").mean()
    brier = brier_score(probability, target, labels="multiclass").mean()
    assert float(nll) == pytest.approx(log_loss(target, probability))
    assert float(brier) == pytest.approx(
        brier_score_loss(target, probability, scale_by_half=False, labels=range(4))
    )


def test_likelihood_and_brier_of_two_classes_equal_scikit_learn():
    logits, target = random_case(1)
    nll = negative_log_likelihood(logits, target, labels="binary").mean()
    brier = brier_score(logits.sigmoid(), target, labels="binary").mean()
    assert float(nll) == pytest.approx(log_loss(target, logits.sigmoid()[:, 0]))
    assert float(brier) == pytest.approx(brier_score_loss(target, logits.sigmoid()[:, 0]))


def test_likelihood_of_an_extreme_logit_is_finite():
    nll = negative_log_likelihood(torch.tensor([[500.0]]), torch.tensor([0]), labels="binary")
    assert float(nll) == pytest.approx(500)


def test_reliability_bins_hold_confidence_accuracy_and_count():
    confidence = torch.tensor([0.05, 0.95, 0.85, 1.0]).double().view(4, 1, 1)
    outcome = torch.tensor([False, True, False, True]).view(4, 1, 1)
    rows = reliability_bins(bin_sums(Confidences(confidence, outcome), 10).sum(0))
    assert len(rows) == 10
    assert rows[9] == {
        "lower": 0.9,
        "upper": 1.0,
        "confidence": pytest.approx(0.975),
        "accuracy": 1.0,
        "count": 2,
    }
    assert rows[8]["accuracy"] == 0
    assert rows[3]["confidence"] is None
    assert sum(row["count"] for row in rows) == 4
