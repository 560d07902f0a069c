"""Which classes a sweep of ever stronger compression forgets first."""

import copy
import math
import re

import pytest
import yaml
from fake_run import compressed_from, fake_predictions
from scipy.special import softmax
from sklearn.metrics import average_precision_score

from medlite.__main__ import _show_sweep
from medlite.command_line import conf_directory
from medlite.errors import RecordError
from medlite.report.compare import main
from medlite.report.forgettability import RISING, class_scores, forgetting_curves, prevalences
from medlite.report.forgettability_section import (
    colour_of,
    forgettability_chart,
    forgettability_section,
)
from medlite.report.result import write_result

COMMON, RAREST = "No retinopathy", "Proliferative"


def set_score(result, name, *, before, after):
    for runtime, report in result.safety.items():
        for kind in ("items", "shown"):
            report[kind] = [
                {**item, "baseline": before, "compressed": after} if item["name"] == name else item
                for item in report[kind]
            ]
        assert name in {item["name"] for kind in ("items", "shown") for item in report[kind]}
        assert runtime


def record(finished, strength, *, seed=0, key="sparsify.sparsity", task="classification", **others):
    """A run of one strength, its rarest class's AP (or Dice) the given share of what it was."""
    result = copy.deepcopy(finished[task][0])
    result.safety = {"onnxruntime": copy.deepcopy(result.safety["onnxruntime"])}
    step, option = key.split(".")
    result.config["compression"] = {step: {"epochs": others.get("epochs", 5), option: strength}}
    result.config["seed"] = seed
    name = "dice_drop/nodule" if task == "segmentation" else "ap_drop/proliferative"
    before = others.get("before", 0.5)
    set_score(result, f"safety/{name}", before=before, after=before * others.get("kept", 1.0))
    if "auc" in others:
        set_score(
            result, "safety/auc_drop/proliferative", before=others["auc"], after=others["auc"]
        )
    return result


def curve_of(found, name):
    return next(curve for curve in found.classes if curve.class_name == name)


def test_the_relative_score_is_that_of_average_precisions(finished):
    result, _ = finished["classification"]
    spec_like = type(
        "Spec", (), {"task": "classification", "class_counts": (486, 128, 206, 194, 66)}
    )
    _, before = fake_predictions(spec_like)
    after = compressed_from(before, spec_like)
    for position, (name, scores) in enumerate(class_scores(result, "onnxruntime").items()):
        is_class = before.targets == position
        expected = [
            average_precision_score(
                is_class, softmax(side.logits.astype("f8"), axis=1)[:, position]
            )
            for side in (before, after)
        ]
        assert (scores.before, scores.after) == pytest.approx(expected, rel=1e-6), name
        assert scores.is_learned


def test_prevalence_is_the_share_of_training_images_or_pixels(finished):
    assert prevalences(finished["classification"][0].dataset)[RAREST] == 66 / 1080
    assert prevalences(finished["segmentation"][0].dataset)["nodule"] == 451_289 / 6_553_600


def test_a_class_is_forgotten_at_the_mildest_level_with_a_mean_drop_over_20_percent(finished):
    kept = {0.9: (0.7, 0.8), 0.5: (0.99, 1.01), 0.8: (0.78, 0.84), 0.7: (0.81, 0.79)}
    runs = [
        record(finished, strength, seed=seed, kept=share)
        for strength, shares in kept.items()
        for seed, share in enumerate(shares)
    ]
    (found,) = forgetting_curves(runs)
    assert found.key == "compression.sparsify.sparsity"
    assert found.strengths == (0.5, 0.7, 0.8, 0.9)
    curve = curve_of(found, RAREST)
    assert [level.relative for level in curve.levels] == pytest.approx([1, 0.8, 0.81, 0.75])
    assert curve.forgotten_at == 0.9
    # Student's t with 1 degree of freedom, from a printed table: sd / sqrt(2) is half the distance.
    assert curve.levels[3].half_width == pytest.approx(12.7062 * 0.05, rel=1e-5)
    assert [level.num_seeds for level in curve.levels] == [2, 2, 2, 2]
    assert [each.class_name for each in found.classes][0::4] == [COMMON, RAREST]


def test_fewer_bits_are_more_compression(finished):
    kept = {8: 1.0, 4: 0.7, 2: 0.3}
    runs = [record(finished, bits, key="ptq.weight_bits", kept=kept[bits]) for bits in (2, 8, 4)]
    (found,) = forgetting_curves(runs)
    assert found.strengths == (8, 4, 2)
    assert curve_of(found, RAREST).forgotten_at == 4


def test_runs_that_differ_elsewhere_too_are_no_curve(finished):
    runs = [record(finished, 0.5, epochs=1), record(finished, 0.9, epochs=5)]
    assert forgetting_curves(runs) == []
    runs.append(record(finished, 0.7, epochs=5))
    (found,) = forgetting_curves(runs)
    assert found.strengths == (0.7, 0.9)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_class_that_was_never_learned_is_told_and_not_divided(finished, task):
    before = 0.0 if task == "segmentation" else 0.06
    changes = {"task": task, "before": before} | ({"auc": 0.5} if task == "classification" else {})
    (found,) = forgetting_curves([record(finished, s, **changes) for s in (0.5, 0.9)])
    curve = found.classes[-1]
    assert (curve.levels, curve.forgotten_at, curve.baseline) == ((), None, before)
    assert forgettability_section(found).rows[-1][-1] == "uncompressed no better than chance"


def test_dice_is_chance_up_to_that_of_calling_every_pixel_the_class(finished):
    share = 451_289 / 6_553_600
    chance = 2 * share / (1 + share)
    runs = [
        record(finished, 0.5, task="segmentation", before=chance * factor, seed=seed)
        for seed, factor in enumerate((1, 1.01))
    ]
    learned = [class_scores(each, "onnxruntime")["nodule"].is_learned for each in runs]
    assert learned == [False, True]


def test_a_seed_at_chance_is_left_out_and_counted(finished):
    runs = [
        record(finished, strength, seed=seed, kept=0.5 if strength > 0.6 else 1.0, auc=auc)
        for strength in (0.5, 0.9)
        for seed, auc in ((0, 0.8), (1, 0.4))
    ]
    (found,) = forgetting_curves(runs)
    curve = curve_of(found, RAREST)
    assert [level.num_seeds for level in curve.levels] == [1, 1]
    section = forgettability_section(found)
    assert section.rows[-1][-1] == "0.9 (seeds at chance left out: 1)"
    assert any(remark.startswith("No ranking of classes") for remark in section.remarks)


def test_a_class_that_the_test_split_lacks_is_told(finished):
    runs = [record(finished, strength) for strength in (0.5, 0.9)]
    for each in runs:
        set_score(each, "safety/ap_drop/mild", before=None, after=None)
    (found,) = forgetting_curves(runs)
    row = next(row for row in forgettability_section(found).rows if row[0] == "Mild")
    assert row[2:] == ("-", "-", "-", "not in the test split")


def test_every_strength_is_an_option_that_can_be_swept():
    for key in RISING:
        step, option = key.split(".")
        text = (conf_directory() / "compression" / f"{step}.yaml").read_text()
        value = yaml.safe_load(text)[step][option]
        assert math.isfinite(float(value)), key
    text = (conf_directory() / "experiment" / "forgettability.yaml").read_text()
    (swept,) = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    assert swept.removeprefix("++compression.") in RISING


@pytest.fixture
def sweep(finished, tmp_path):
    runs = []
    for strength, kept in ((0.5, 1.0), (0.9, 0.6)):
        for seed in range(2):
            directory = tmp_path / "runs" / f"{strength}-{seed}"
            directory.mkdir(parents=True)
            result = record(finished, strength, seed=seed, kept=kept)
            result.choices["compression"] = "sparsify"
            write_result(result, directory)
            runs.append(directory)
    return runs


def test_the_verb_shows_it_as_text_markdown_and_chart(sweep, tmp_path, capsys):
    markdown = tmp_path / "table.md"
    words = [str(tmp_path), "--forgettability", "--markdown", str(markdown)]
    assert main(words) == 0
    assert "AP relative to the uncompressed model" in capsys.readouterr().out
    rows = [line.split(" | ") for line in markdown.read_text().splitlines() if RAREST in line]
    assert rows == [["| Proliferative", "6.11%", "0.500", "1 ± 0", "0.600 ± 0", "0.9 |"]]
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<polyline") == 1 + 5, "the limit and a line for each class"
    assert "Proliferative (6.11%)" in page
    assert "sparsity (higher: more compressed)" in page


def test_a_sweep_of_strengths_ends_in_it(sweep, capsys):
    _show_sweep(sweep)
    assert "forgotten at" in capsys.readouterr().out
    _show_sweep(sweep[:2])
    assert "forgotten at" not in capsys.readouterr().out, "one level is no curve"


def test_asked_for_without_a_sweep_it_tells_what_to_run(sweep):
    with pytest.raises(RecordError, match=r"--forgettability: .* run experiment=forgettability"):
        main([*map(str, sweep[:2]), "--forgettability"])


def test_wide_intervals_of_few_seeds_end_with_the_axis(finished):
    runs = [
        record(finished, strength, seed=seed, kept=kept)
        for strength in (0.5, 0.9)
        for seed, kept in ((0, 0.2), (1, 1.0))
    ]
    (found,) = forgetting_curves(runs)
    assert curve_of(found, RAREST).levels[0].half_width > 5
    chart = forgettability_chart(found)
    lines = re.findall(r'<polyline points="([^"]*)"', chart)
    heights = [float(point.split(",")[1]) for line in lines for point in line.split()]
    assert min(heights) >= 30, "the top of the axis"
    assert max(heights) <= 300, "its foot"


def test_the_rarest_class_is_the_reddest():
    assert [colour_of(position, 3) for position in range(3)] == [
        "hsl(220 55% 45%)", "hsl(110 55% 45%)", "hsl(0 55% 45%)"
    ]  # fmt: skip
