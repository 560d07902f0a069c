import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score, roc_auc_score

from medlite.metrics.counts import class_counts
from medlite.metrics.decisions import decisions, probabilities
from medlite.metrics.ranking import weighted_auc
from medlite.metrics.task import build_metrics, primary_metric
from medlite.types import DataSpec


def make_spec(task, labels, num_names):
    return DataSpec(
        name="fake", task=task, labels=labels, in_channels=1,
        num_classes=1 if labels == "binary" else num_names, image_size=(8, 8),
        class_names=tuple(f"class {i}" for i in range(num_names)),
        class_counts=(10,) * num_names, num_samples={"test": 4}, num_groups={"test": 4},
        group_kind="image", modality="shape", provenance="random", origin="none",
        preprocessing="none",
    )  # fmt: skip


def fill(spec, logits, target, batch=7):
    metrics = build_metrics(spec)
    for start in range(0, len(logits), batch):
        metrics.update(logits[start : start + batch], target[start : start + batch])
    return {name: float(value) for name, value in metrics.compute().items()}


def test_probabilities_follow_the_labels():
    logits = torch.tensor([[0.0, np.log(3.0)]])
    assert probabilities(logits, "multiclass").tolist()[0] == pytest.approx([0.25, 0.75])
    assert probabilities(logits, "multilabel").tolist()[0] == pytest.approx([0.5, 0.75])
    assert probabilities(logits[:, 1:], "binary").tolist()[0] == pytest.approx([0.75])


def test_decisions_have_the_targets_shape():
    image = torch.randn(2, 3, 4, 5, 6)
    assert decisions(image, "multiclass").shape == (2, 4, 5, 6)
    assert decisions(image[:, :1], "binary").shape == (2, 4, 5, 6)
    assert decisions(image[:, :, 0, 0, 0], "multilabel").shape == (2, 3)


def test_logits_between_zero_and_one_are_not_taken_for_probabilities():
    spec = make_spec("classification", "binary", 2)
    values = fill(spec, torch.tensor([[0.2], [0.3], [-0.1]]), torch.tensor([1, 1, 0]))
    assert values["accuracy"] == 1


@pytest.mark.parametrize(("labels", "num_names"), [("binary", 2), ("multiclass", 4)])
def test_classification_metrics_equal_scikit_learn(labels, num_names):
    torch.manual_seed(0)
    spec = make_spec("classification", labels, num_names)
    logits, target = torch.randn(60, spec.num_classes), torch.randint(num_names, (60,))
    values = fill(spec, logits, target)
    decided = decisions(logits, labels)
    probability = probabilities(logits.double(), labels)
    score = probability[:, 0] if labels == "binary" else probability
    assert values["accuracy"] == pytest.approx(accuracy_score(target, decided))
    assert values["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(target, decided))
    assert values["auc"] == pytest.approx(
        roc_auc_score(target, score, multi_class="ovr", average="macro")
    )


def test_multilabel_metrics_equal_scikit_learn():
    torch.manual_seed(0)
    spec = make_spec("classification", "multilabel", 3)
    logits, target = torch.randn(50, 3), torch.randint(2, (50, 3)).float()
    values = fill(spec, logits, target)
    decided = (logits > 0).long()
    assert values["accuracy"] == pytest.approx(float((decided == target).double().mean()))
    assert values["auc"] == pytest.approx(roc_auc_score(target, logits, average="macro"))
    balanced = [balanced_accuracy_score(target[:, i], decided[:, i]) for i in range(3)]
    assert values["balanced_accuracy"] == pytest.approx(np.mean(balanced))


def test_dice_is_pooled_over_all_batches():
    torch.manual_seed(0)
    spec = make_spec("segmentation", "multiclass", 3)
    logits, target = torch.randn(9, 3, 8, 8), torch.randint(3, (9, 8, 8))
    target[:4] = 0
    values = fill(spec, logits, target, batch=2)
    decided = logits.argmax(1).flatten()
    overlap = jaccard_score(target.flatten(), decided, average=None)[1:]
    assert values["iou"] == pytest.approx(overlap.mean())
    assert values["dice"] == pytest.approx((2 * overlap / (1 + overlap)).mean())


def test_a_class_absent_from_the_targets_is_left_out_of_the_means():
    torch.manual_seed(0)
    spec = make_spec("classification", "multiclass", 4)
    logits, target = torch.randn(40, 4), torch.randint(3, (40,))
    values = fill(spec, logits, target)
    probability = logits.double().softmax(1)
    one_vs_rest = [roc_auc_score(target == k, probability[:, k]) for k in range(3)]
    assert values["auc"] == pytest.approx(np.mean(one_vs_rest))
    found = [(logits.argmax(1)[target == k] == k).double().mean() for k in range(3)]
    assert values["balanced_accuracy"] == pytest.approx(np.mean(found))


def test_dice_without_any_foreground_is_not_a_number():
    spec = make_spec("segmentation", "binary", 2)
    values = fill(spec, torch.randn(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long))
    assert np.isnan(values["dice"])


def test_weighted_auc_equals_repeated_samples_with_ties():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (30,), generator=generator).double()
    is_positive = torch.rand(30, generator=generator) < 0.4
    weights = torch.randint(4, (6, 30), generator=generator)
    areas = weighted_auc(scores, is_positive, weights.double())
    for area, weight in zip(areas, weights, strict=True):
        repeated = torch.repeat_interleave(torch.arange(30), weight)
        assert float(area) == pytest.approx(roc_auc_score(is_positive[repeated], scores[repeated]))


def test_counts_of_each_sample_add_up_to_its_pixels():
    torch.manual_seed(0)
    decided, target = torch.randint(3, (5, 6, 7)), torch.randint(3, (5, 6, 7))
    counts = class_counts(decided, target, labels="multiclass", num_classes=3)
    assert counts.shape == (5, 3, 4)
    assert (counts.sum(-1) == 42).all()
    assert counts[2, 1, 1] == ((decided[2] == 1) & (target[2] != 1)).sum()


@pytest.mark.parametrize(("task", "name"), [("segmentation", "dice"), ("classification", "auc")])
def test_the_primary_metric_is_among_the_watched(task, name):
    spec = make_spec(task, "multiclass", 3)
    assert primary_metric(spec) == name
    assert name in build_metrics(spec)
