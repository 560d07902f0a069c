import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from medlite.metrics import calibration
from medlite.metrics.distance import hausdorff95, normalised_surface_dice
from medlite.metrics.intervals import clopper_pearson_interval, wilson_interval
from medlite.metrics.paired_scores import paired_scores, surface_distances
from medlite.metrics.ranking import weighted_average_precision
from medlite.metrics.statistics import grouped_scores
from medlite.types import DataSpec, Predictions


def make_spec(task="classification", labels="multiclass", num_names=4, spacing_mm=None):
    return DataSpec(
        name="fake", task=task, labels=labels, in_channels=1,
        num_classes=1 if labels == "binary" else num_names, image_size=(8, 8),
        class_names=tuple(f"Class {i}" for i in range(num_names)), class_counts=(9,) * num_names,
        num_samples={}, num_groups={}, group_kind="patient", modality="shape",
        provenance="random", origin="none", preprocessing="none", spacing_mm=spacing_mm,
    )  # fmt: skip


def make_classes(num_samples=120, num_classes=4, samples_a_patient=2, seed=0):
    """Patients with several images; scores are rounded, so that there are ties."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(num_classes, size=num_samples)
    logits = generator.normal(size=(num_samples, num_classes)).round(1)
    logits[np.arange(num_samples), targets] += 1
    groups = tuple(f"p{i // samples_a_patient:03d}" for i in range(num_samples))
    return Predictions(logits=logits.astype(np.float32), targets=targets, groups=groups)


def resample(predictions, weights):
    """The images of each patient as often as its weight says."""
    names = sorted(set(predictions.groups))
    repeats = [int(weights[names.index(group)]) for group in predictions.groups]
    where = np.repeat(np.arange(len(repeats)), repeats)
    probability = torch.from_numpy(predictions.logits[where]).double().softmax(1).numpy()
    return probability, predictions.targets[where]


def weights_of(predictions, seed=0):
    num_groups = len(set(predictions.groups))
    drawn = np.random.default_rng(seed).integers(num_groups, size=(3, num_groups))
    return np.stack([np.bincount(row, minlength=num_groups) for row in drawn]).astype(np.float64)


@pytest.fixture(scope="module")
def resampled():
    """Every statistic on three resamples, and the resamples written out."""
    predictions, spec = make_classes(), make_spec()
    weights = weights_of(predictions)
    statistics = paired_scores(predictions, spec, grouped_scores(predictions, spec))
    values = {name: each(torch.from_numpy(weights)).numpy() for name, each in statistics.items()}
    return values, [resample(predictions, row) for row in weights]


def test_areas_of_a_resample_are_those_of_scikit_learn(resampled):
    values, draws = resampled
    for name, reference in (("auc", roc_auc_score), ("ap", average_precision_score)):
        for row, (probability, targets) in enumerate(draws):
            areas = [reference(targets == k, probability[:, k]) for k in range(4)]
            found = [values[f"{name}/class_{k}"][row] for k in range(4)]
            assert found == pytest.approx(areas)
            assert values[name][row] == pytest.approx(np.mean(areas))


def test_specificities_of_a_resample_are_those_of_a_confusion_matrix(resampled):
    values, draws = resampled
    for row, (probability, targets) in enumerate(draws):
        matrix = confusion_matrix(targets, probability.argmax(1), labels=range(4))
        for k in range(4):
            others = np.delete(matrix, k, axis=0)
            expected = 1 - others[:, k].sum() / others.sum()
            assert values[f"specificity/class_{k}"][row] == pytest.approx(expected)


def test_accuracy_and_brier_of_a_resample_are_those_of_its_images(resampled):
    values, draws = resampled
    for row, (probability, targets) in enumerate(draws):
        assert values["accuracy"][row] == pytest.approx((probability.argmax(1) == targets).mean())
        error = ((probability - np.eye(4)[targets]) ** 2).sum(1).mean()
        assert values["brier"][row] == pytest.approx(error)


def test_classwise_calibration_of_a_resample_is_that_of_a_loop_over_bins(resampled):
    values, draws = resampled
    for row, (probability, targets) in enumerate(draws):
        errors = []
        for k in range(4):
            confidence, outcome = probability[:, k], targets == k
            place = np.minimum((confidence * 15).astype(int), 14)
            gaps = [(confidence - outcome)[place == b].sum() for b in range(15)]
            errors.append(np.abs(gaps).sum() / len(targets))
        assert values["ece_classwise"][row] == pytest.approx(np.mean(errors))


def test_adaptive_calibration_of_the_whole_split_is_that_of_the_evaluation():
    predictions, spec = make_classes(), make_spec()
    scores = grouped_scores(predictions, spec)
    statistic = paired_scores(predictions, spec, scores)["ece_adaptive"]
    judged = calibration.confidences(
        torch.from_numpy(predictions.logits).softmax(1),
        torch.from_numpy(predictions.targets),
        labels="multiclass",
        task="classification",
    )
    everyone = torch.ones(1, scores.num_groups, dtype=torch.float64)
    expected = calibration.adaptive_calibration_error(judged)
    assert float(statistic(everyone)) == pytest.approx(expected, abs=1e-6)


def test_adaptive_calibration_of_a_resample_keeps_the_bins_of_the_split():
    predictions, spec = make_classes(samples_a_patient=1), make_spec()
    scores = grouped_scores(predictions, spec)
    weights = weights_of(predictions)
    found = paired_scores(predictions, spec, scores)["ece_adaptive"](torch.from_numpy(weights))
    probability = torch.from_numpy(predictions.logits).softmax(1).numpy()
    confidence, right = probability.max(1), probability.argmax(1) == predictions.targets
    bins = np.array_split(np.argsort(confidence, kind="stable"), 15)
    for row, value in zip(weights, found, strict=True):
        gaps = [abs((row * (confidence - right))[members].sum()) for members in bins]
        assert float(value) == pytest.approx(sum(gaps) / row.sum(), abs=1e-6)


def test_average_precision_is_undefined_without_positives_and_one_when_all_are_first():
    scores, weights = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.ones(1, 4).double()
    nobody, first = torch.zeros(4, dtype=torch.bool), torch.tensor([True, True, False, False])
    assert torch.isnan(weighted_average_precision(scores, nobody, weights)).all()
    assert float(weighted_average_precision(scores, first, weights)) == 1


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (3, 7), (12, 12), (40, 41)])
def test_intervals_of_proportions_are_those_of_scipy(hits, trials):
    exact = binomtest(hits, trials).proportion_ci(method="exact")
    score = binomtest(hits, trials).proportion_ci(method="wilson")
    assert clopper_pearson_interval(hits, trials) == pytest.approx((exact.low, exact.high))
    assert wilson_interval(hits, trials) == pytest.approx((score.low, score.high))


def test_the_exact_interval_of_few_patients_never_covers_less_than_it_says():
    for share in (0.02, 0.3, 0.9):
        for num_trials in (6, 20):
            chance = [binomial(k, num_trials, share) for k in range(num_trials + 1)]
            ends = [clopper_pearson_interval(k, num_trials) for k in range(num_trials + 1)]
            is_in = [low <= share <= high for low, high in ends]
            assert sum(p for p, inside in zip(chance, is_in, strict=True) if inside) >= 0.95


def binomial(hits, trials, share):
    from scipy.stats import binom

    return binom.pmf(hits, trials, share)


def make_masks(num_images=12, seed=0):
    generator = np.random.default_rng(seed)
    targets = np.zeros((num_images, 16, 16), dtype=np.int64)
    for image in targets:
        row, column = generator.integers(0, 8, size=2)
        image[row : row + 4, column : column + 4] = 1
        image[row + 4 : row + 8, column : column + 4] = 2
    return targets


def with_masks(targets, masks):
    logits = 8 * np.eye(3, dtype=np.float32)[masks].transpose(0, 3, 1, 2)
    groups = tuple(f"p{i // 2:02d}" for i in range(len(targets)))
    return Predictions(logits=np.ascontiguousarray(logits), targets=targets, groups=groups)


def test_distances_are_compared_where_both_models_have_an_outline():
    targets = make_masks()
    shifted, missed = np.roll(targets, 1, axis=2), np.roll(targets, 2, axis=2)
    missed[0][missed[0] == 2] = 0
    spec = make_spec("segmentation", num_names=3, spacing_mm=(0.5, 0.5))
    first, second, num_shared = surface_distances(
        with_masks(targets, shifted), with_masks(targets, missed), spec
    )
    everyone = torch.ones(1, 6, dtype=torch.float64)
    before = hausdorff95(shifted, targets, num_classes=3, spacing_mm=(0.5, 0.5))
    after = hausdorff95(missed, targets, num_classes=3, spacing_mm=(0.5, 0.5))
    assert num_shared == {"hausdorff95_mm/class_1": 12, "hausdorff95_mm/class_2": 11}
    assert np.isnan(after[0, 1])
    name = "hausdorff95_mm/class_2"
    assert float(first[name](everyone)) == pytest.approx(before[1:, 1].mean())
    assert float(second[name](everyone)) == pytest.approx(after[1:, 1].mean())


def test_several_foreground_classes_have_a_calibration_error_each():
    targets = make_masks()
    predictions = with_masks(targets, np.roll(targets, 1, axis=2))
    spec = make_spec("segmentation", num_names=3)
    scores = grouped_scores(predictions, spec)
    statistics = paired_scores(predictions, spec, scores)
    everyone = torch.ones(1, scores.num_groups, dtype=torch.float64)
    each = [float(statistics[f"ece/class_{k}"](everyone)) for k in (1, 2)]
    assert scores.value("ece") == pytest.approx(np.mean(each))


def outline(mask):
    """Coordinates of the pixels of a mask that touch its outside, by an edge."""
    return np.argwhere(mask & ~binary_erosion(mask))


@pytest.mark.parametrize("spacing_mm", [None, (1.0, 1.0), (0.9, 2.5)])
def test_the_surface_dice_is_the_share_of_both_outlines_that_is_near_the_other(spacing_mm):
    targets = make_masks()
    generator = np.random.default_rng(3)
    masks = np.roll(targets, (2, 1), axis=(1, 2))
    masks[:, 7:9] = generator.integers(3, size=masks[:, 7:9].shape)
    masks[0][masks[0] == 2] = 0
    scores = normalised_surface_dice(masks, targets, num_classes=3, spacing_mm=spacing_mm)
    for image, label in np.ndindex(*scores.shape):
        sides = [outline(each[image] == label + 1) for each in (masks, targets)]
        if not len(sides[0]):
            assert scores[image, label] == 0
            continue
        distances = cdist(*(side * np.array(spacing_mm or (1, 1)) for side in sides))
        near = [(distances.min(axis=axis) <= 2).sum() for axis in (0, 1)]
        expected = sum(near) / sum(map(len, sides))
        assert scores[image, label] == pytest.approx(expected)
    assert scores[0, 1] == 0
    assert 0 < np.nanmin(scores[1:]) < np.nanmax(scores) <= 1


def test_surface_dice_counts_the_images_that_have_the_class():
    targets = make_masks()
    targets[3][targets[3] == 2] = 0
    predictions = with_masks(targets, np.roll(make_masks(), 5, axis=1))
    spec = make_spec("segmentation", num_names=3, spacing_mm=(1.0, 1.0))
    statistics = paired_scores(predictions, spec, grouped_scores(predictions, spec))
    weights = torch.tensor([[1.0, 3, 0, 1, 1, 1]], dtype=torch.float64)
    of_images = normalised_surface_dice(
        np.roll(make_masks(), 5, axis=1), targets, num_classes=3, spacing_mm=(1.0, 1.0)
    )[:, 1]
    counted = np.repeat([1.0, 3, 0, 1, 1, 1], 2) * np.isfinite(of_images)
    expected = (counted * np.nan_to_num(of_images)).sum() / counted.sum()
    assert float(statistics["nsd_2mm/class_2"](weights)) == pytest.approx(expected)
    assert np.isnan(of_images[3])
