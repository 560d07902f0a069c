"""Exemplars of the scores that several seeds give on average."""

import copy

import numpy as np
import pytest
from fake_run import make_run

from medlite.__main__ import _show_sweep
from medlite.gate.exemplars_over_seeds import exemplar_sections, exemplars_over_seeds
from medlite.report.compare import read_results
from medlite.report.result import write_result

NUM_IMAGES, NUM_SEEDS = 200, 12
CHANGED = tuple(range(190, 200))
"""the images of the last class; compression changes them in every seed"""
TARGETS = np.repeat([0, 1, 2, 3, 4], (60, 50, 50, 30, 10))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("record"), "classification", ("onnxruntime",))


def predictions_of(seed):
    """Noise that differs between seeds, and a loss of the last class that does not."""
    random = np.random.default_rng(seed)
    before = 2.0 * np.eye(5)[TARGETS] + random.normal(0, 0.3, (NUM_IMAGES, 5))
    after = before + random.normal(0, 1.0, before.shape)
    after[CHANGED, 4] -= 1.5
    return {"baseline/onnxruntime": np.float32(before), "onnxruntime": np.float32(after)}


@pytest.fixture
def runs(tmp_path, record):
    """A run directory a seed."""
    groups = np.array([f"image {position}" for position in range(NUM_IMAGES)])
    directories = []
    for seed in range(NUM_SEEDS):
        directory = tmp_path / "runs" / f"seed{seed}"
        (directory / "bench").mkdir(parents=True)
        result = copy.deepcopy(record)
        result.config["seed"] = seed
        write_result(result, directory)
        np.savez(directory / "bench" / "predictions.npz", **predictions_of(seed))
        np.savez(directory / "bench" / "targets.npz", targets=TARGETS, groups=groups)
        directories.append(directory)
    return directories


def found_in(directories):
    (found,) = exemplars_over_seeds(read_results(directories)[0])
    return found


def test_what_all_seeds_lose_is_found_where_noise_is_averaged_away(runs):
    found = found_in(runs)
    assert found.seeds == tuple(range(NUM_SEEDS))
    assert {each.position for each in found.report.exemplars} == set(CHANGED)
    rare = found.report.classes[-1]
    assert (rare.class_name, rare.num_exemplars, rare.num_others) == ("Proliferative", 10, 0)
    two = found_in(runs[:2])
    assert {each.position for each in two.report.exemplars} != set(CHANGED), "noise of few seeds"


def test_a_seed_with_other_test_images_is_told_and_not_mixed_in(runs):
    alone = found_in(runs[:2]).report
    arrays = np.random.default_rng(0).permutation(TARGETS)
    groups = np.array([f"other {position}" for position in range(NUM_IMAGES)])
    np.savez(runs[2] / "bench" / "targets.npz", targets=arrays, groups=groups)
    found = found_in(runs[:3])
    assert found.seeds == (0, 1)
    assert found.report == alone
    (told,) = found.left_out
    assert told.startswith("Seed 2 is left out: ")
    assert "disagree on the labels" in told


def test_the_same_labels_of_other_patients_are_other_test_images(runs):
    groups = np.array([f"other {position}" for position in range(NUM_IMAGES)])
    np.savez(runs[1] / "bench" / "targets.npz", targets=TARGETS, groups=groups)
    found = found_in(runs[:2])
    assert found.report is None
    (section,) = exemplar_sections(read_results(runs[:2])[0])
    assert "disagree on the image of" in section.remarks[0]
    assert section.remarks[-1].startswith("Fewer than two seeds saw the same test images")


def test_seeds_without_predictions_or_with_infinite_ones_are_left_out(runs):
    (runs[0] / "bench" / "predictions.npz").unlink()
    broken = predictions_of(1)
    broken["onnxruntime"][3, 0] = np.inf
    np.savez(runs[1] / "bench" / "predictions.npz", **broken)
    found = found_in(runs[:4])
    assert found.seeds == (2, 3)
    assert "has no bench/predictions.npz" in found.left_out[0]
    assert "outputs that are not finite" in found.left_out[1]


def test_one_seed_has_no_average(runs):
    assert exemplars_over_seeds(read_results(runs[:1])[0]) == []


def test_a_sweep_over_seeds_ends_in_them(runs, tmp_path, capsys):
    _show_sweep(runs)
    printed = capsys.readouterr().out
    (page,) = (tmp_path / "sweeps").glob("sweep-*.html")
    for shown in (printed, page.read_text()):
        assert "Images that compression changed, over seeds: retinamnist" in shown
        assert "10 of 200 test images" in shown
        assert "Places in the test split, the most changed first: " in shown
        assert "not finite (" in shown


def test_recipes_that_differ_in_their_strength_are_told_apart(runs):
    results, _ = read_results(runs[:4])
    for position, result in enumerate(results.values()):
        sparsity = 0.5 if position < 2 else 0.9
        result.config["compression"] = {"sparsify": {"sparsity": sparsity}}
    names = [found.name for found in exemplars_over_seeds(results)]
    assert [name.partition("sparsify.")[2] for name in names] == [
        "sparsity 0.5 on onnxruntime", "sparsity 0.9 on onnxruntime"
    ]  # fmt: skip
