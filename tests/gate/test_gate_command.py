import json
import re
import shutil

import numpy as np
import pytest
from fake_run import classification_spec, compressed_from, fake_predictions
from fake_run import make_run as make_fake

from medlite.__main__ import main as medlite
from medlite.command_line import conf_directory
from medlite.config import margins_config
from medlite.errors import ConfigError, RecordError
from medlite.gate.command import main, split_source
from medlite.report.result import write_result
from medlite.safety.gate import compare_models
from medlite.safety.operating_point import choose_operating_points
from medlite.safety.plan import OPTIONAL, REQUIRED
from medlite.safety_settings import SafetyMargins

NUM_CLASSES = 4


def write_predictions(path, logits, targets):
    ids = np.array([f"image {i}" for i in range(len(targets))])
    np.savez(path, id=ids, patient=ids, label=targets, logits=np.float32(logits))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """A model, its twin, one that lost the rare class, and one that is too sure."""
    generator = np.random.default_rng(0)
    targets = np.repeat(np.arange(NUM_CLASSES), (150, 150, 150, 60))
    logits = generator.normal(size=(len(targets), NUM_CLASSES))
    logits[np.arange(len(targets)), targets] += 2
    logits *= 2  # the scale at which this noise is calibrated
    broken = logits.copy()
    broken[:, 3] -= 8
    sides = {"model": logits, "twin": logits, "broken": broken, "sure": 6 * logits}
    return {
        name: write_predictions(tmp_path / f"{name}.npz", each, targets)
        for name, each in sides.items()
    }


def test_a_broken_class_ends_in_3_under_enforce_alone(files, capsys):
    assert main([files["model"], files["broken"]]) == 0
    assert main([files["model"], files["broken"], "--enforce"]) == 3
    shown = capsys.readouterr().out
    assert "FAIL" in shown
    assert "sensitivity" in shown
    assert "class_3" in shown.replace(" ", "_")


def test_brackets_in_a_path_are_no_markup(files, tmp_path, capsys):
    folder = tmp_path / "[old]" / "[" / "b]"
    folder.mkdir(parents=True)
    moved = shutil.copy(files["twin"], folder / "x.npz")
    assert main([files["model"], str(moved), "--json", str(tmp_path / "gate.json")]) == 0
    assert "[old]/[/b]/x.npz" in capsys.readouterr().out.replace("\n", "")


def test_overconfidence_is_enforced(files):
    assert main([files["model"], files["sure"], "--enforce"]) == 3


def test_twins_pass_under_enforce(files):
    assert main([files["model"], files["twin"], "--enforce"]) == 0


def test_the_command_line_ends_with_the_same_code(files):
    with pytest.raises(SystemExit) as ended:
        medlite(["gate", files["model"], files["broken"], "--enforce"])
    assert ended.value.code == 3


def test_what_is_not_settled_ends_in_0(tmp_path):
    generator = np.random.default_rng(1)
    targets = np.repeat(np.arange(NUM_CLASSES), 3)
    logits = 9 * np.eye(NUM_CLASSES)[targets]
    sides = [
        write_predictions(tmp_path / f"{name}.npz", each, targets)
        for name, each in (("a", logits), ("b", logits + 0.01 * generator.normal(size=(12, 4))))
    ]
    assert main([*sides, "--enforce", "--json", str(tmp_path / "gate.json")]) == 0
    report = json.loads((tmp_path / "gate.json").read_text())["report"]
    assert report["verdict"] == "INCONCLUSIVE"
    notes = {item["name"]: item["note"] for item in report["items"]}
    assert (
        notes["safety/metric_drop"]
        == "needs n >= 20 to pass; has 3 patients behind the rarest class"
    )


def test_json_and_page_hold_the_report_and_its_margins(files, tmp_path):
    words = ["--json", str(tmp_path / "g.json"), "--html", str(tmp_path / "g.html")]
    main([files["model"], files["broken"], "--safety", "strict", *words])
    plain = json.loads((tmp_path / "g.json").read_text())
    assert plain["margins"]["specificity_drop"] == 0.02
    assert "enforce" not in plain["margins"]
    assert plain["report"]["rarest_class"] == {
        "name": "class 3", "prevalence": 60 / 510, "train_count": None, "test_count": 60,
    }  # fmt: skip
    page = (tmp_path / "g.html").read_text()
    assert "safety table" not in page
    for text in ("sensitivity drop/class 3", "Clopper-Pearson", "DeLong p", "shown", "strict"):
        assert text in page


def test_unknown_margins_are_told(files):
    with pytest.raises(ConfigError, match="did you mean 'strict'"):
        main([files["model"], files["twin"], "--safety", "strickt"])


def make_run(directory, targets, groups, finished, **logits):
    """A recorded run as far as the gate reads it."""
    (directory / "bench").mkdir(parents=True)
    shutil.copy(finished / "result.json", directory)
    np.savez(directory / "bench" / "predictions.npz", **logits)
    np.savez(directory / "bench" / "targets.npz", targets=targets, groups=np.array(groups))
    return directory


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The record of a fake run, and what its models said."""
    directory = tmp_path_factory.mktemp("finished")
    spec = classification_spec()
    _, before = fake_predictions(spec)
    write_result(make_fake(directory, "classification", ("openvino",)), directory)
    return directory, spec, before, compressed_from(before, spec)


@pytest.fixture
def runs(tmp_path, world):
    """Two runs on runtimes that overlap in one."""
    finished, spec, before, after = world
    rest = (before.targets, before.groups, finished)
    first = make_run(
        tmp_path / "float", *rest, onnxruntime=before.logits + 1, openvino=before.logits
    )
    second = make_run(
        tmp_path / "int8",
        *rest,
        **{"baseline/openvino": before.logits, "openvino": after.logits},
    )
    expected = compare_models(before, after, spec, SafetyMargins())
    return first, second, expected


def test_two_runs_are_compared_on_the_first_runtime_they_share(runs, tmp_path):
    first, second, expected = runs
    main([str(first), str(second), "--json", str(tmp_path / "g.json")])
    plain = json.loads((tmp_path / "g.json").read_text())
    assert plain["compressed"] == f"{second}@openvino"
    losses = {item["name"]: item["difference"] for item in plain["report"]["items"]}
    assert losses == {item.name: item.difference for item in expected.items}
    assert plain["report"]["rarest_class"]["train_count"] == 66


def test_a_candidate_of_a_run_can_be_named(runs, tmp_path):
    _, second, expected = runs
    words = [f"{second}@baseline/openvino", str(second / "result.json")]
    main([*words, "--json", str(tmp_path / "g.json")])
    report = json.loads((tmp_path / "g.json").read_text())["report"]
    assert report["verdict"] == expected.verdict


def test_runs_are_compared_at_the_operating_points_of_the_first(world, runs, tmp_path):
    _, spec, before, after = world
    second = runs[1]
    points = choose_operating_points(before, spec, sensitivity=0.9)
    expected = compare_models(before, after, spec, SafetyMargins(), operating_points=points)
    sides = [f"{second}@baseline/openvino", f"{second}@openvino"]
    main([*sides, "--json", str(tmp_path / "g.json"), "--html", str(tmp_path / "g.html")])
    report = json.loads((tmp_path / "g.json").read_text())["report"]
    losses = {item["name"]: item["difference"] for item in report["items"]}
    assert losses == {item.name: item.difference for item in expected.items}
    assert len(losses) == 3 + 2 * len(spec.class_names)
    assert "called from probability" in (tmp_path / "g.html").read_text()


def test_a_candidate_that_was_not_measured_is_told(runs):
    first, second, _ = runs
    with pytest.raises(RecordError, match=r"@openvno: no such candidate, did you mean 'openvino'"):
        main([f"{first}@openvno", str(second)])


def test_a_run_without_targets_says_how_to_get_them(runs):
    first, second, _ = runs
    (second / "bench" / "targets.npz").unlink()
    with pytest.raises(RecordError, match=re.escape("has no bench/targets.npz: start its command")):
        main([str(first), str(second)])


def test_runs_on_other_patients_are_refused(runs):
    first, second, _ = runs
    with np.load(second / "bench" / "targets.npz") as arrays:
        targets, groups = arrays["targets"], arrays["groups"]
    np.savez(second / "bench" / "targets.npz", targets=targets, groups=groups[::-1])
    with pytest.raises(RecordError, match="disagree on the image of 400 ids"):
        main([str(first), str(second)])


def test_a_path_with_an_at_sign_stays_a_path(tmp_path):
    path = tmp_path / "a@b"
    path.mkdir()
    assert split_source(str(path)) == (path, None)
    assert split_source(f"{path}@openvino") == (path, "openvino")


def test_the_margins_of_the_documentation_are_those_of_the_options():
    documentation = (conf_directory().parent / "docs" / "gate.md").read_text()
    for name in (*REQUIRED, *OPTIONAL, "num_resamples"):
        (row,) = re.findall(rf"^\| `{name}`.*$", documentation, re.MULTILINE)
        stated = [cell.strip() for cell in row.split("|")[2:5]]
        for option, text in zip(("default", "strict", "research"), stated, strict=True):
            value = getattr(margins_config(option, [conf_directory()]), name)
            assert text == ("shown" if value is None else f"{value:,}"), (option, name)
