import dataclasses
import errno
import json
import math
import os
import subprocess

import jsonschema
import pytest
from fake_run import make_run

from medlite.errors import RecordError
from medlite.report import environment
from medlite.report.card import build_card
from medlite.report.card_categories import task_fields
from medlite.report.redact import redact_paths
from medlite.report.result import SCHEMA_PATH, RunResult, read_result, write_result
from medlite.report.terminal import console, print_summary
from medlite.types import Measurement

SCHEMA = json.loads(SCHEMA_PATH.read_text())


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_written_result_is_valid_by_its_schema(finished, task):
    _, directory = finished[task]
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    plain = json.loads((directory / "result.json").read_text())
    jsonschema.validate(plain, SCHEMA, cls=jsonschema.Draft202012Validator)


def test_the_schema_describes_every_field():
    assert set(SCHEMA["properties"]) == {field.name for field in dataclasses.fields(RunResult)}
    rows = SCHEMA["properties"]["measurements"]["items"]["properties"]
    assert set(rows) == {field.name for field in dataclasses.fields(Measurement)}
    assert all(described(node) for node in (*SCHEMA["properties"].values(), *rows.values()))


def described(node):
    return len(node["description"]) > 5 and all(map(described, node.get("properties", {}).values()))


def test_the_schema_refuses_an_unavailable_number_without_a_reason(run):
    _, directory = run
    plain = json.loads((directory / "result.json").read_text())
    plain["measurements"][0].update(value=None, source="unavailable", note="")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plain, SCHEMA)


def test_a_result_reads_back_as_it_was_written(run, tmp_path):
    result, directory = run
    again = read_result(directory / "result.json")
    assert again.measurements == result.measurements
    assert again.card == result.card
    write_result(again, tmp_path)
    assert (tmp_path / "result.json").read_text() == (directory / "result.json").read_text()


def test_numbers_that_are_not_finite_become_null_or_unavailable(run, tmp_path):
    result, _ = run
    result.measurements = [Measurement(name="test/dice", value=math.nan, unit="")]
    result.history["baseline"][0]["val/dice"] = math.inf
    text = write_result(result, tmp_path).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    again = read_result(tmp_path / "result.json")
    assert again.measurements[0].source == "unavailable"
    assert again.measurements[0].note == "the value was nan"
    assert again.history["baseline"][0]["val/dice"] is None


def test_nothing_in_a_result_names_a_patient_or_a_data_path(run):
    _, directory = run
    text = (directory / "result.json").read_text()
    assert "jane_doe" not in text
    assert "patient 3" not in text


def no_space(*_arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_and_leaves_the_earlier_file_whole(run, tmp_path, monkeypatch):
    result, _ = run
    before = write_result(result, tmp_path).read_text()
    result.name = "another"
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RecordError, match=r"result\.json could not be written: No space left"):
        write_result(result, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == before


def test_a_directory_that_cannot_be_made_is_told(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError, match="could not be written: Not a directory"):
        write_result(run[0], tmp_path / "file" / "run")


def damaged(directory, path, change):
    plain = json.loads((directory / "result.json").read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    return path


def test_a_cut_off_result_is_refused(run, tmp_path):
    path = tmp_path / "result.json"
    path.write_text((run[1] / "result.json").read_text()[:500])
    with pytest.raises(RecordError, match=r"result\.json is not whole JSON"):
        read_result(path)


def test_a_missing_result_is_refused(tmp_path):
    with pytest.raises(RecordError, match="could not be read: No such file"):
        read_result(tmp_path / "result.json")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda plain: plain.update(schema_version=99), "has schema version 99, expected 1"),
        (lambda plain: plain.pop("verdict"), r"missing fields \['verdict'\]"),
        (lambda plain: plain.update(extra=1), r"unknown fields \['extra'\]"),
        (lambda plain: plain["measurements"].append({"name": "x"}), "is malformed"),
        (lambda plain: plain["measurements"][0].update(value=None), "does not go with source"),
    ],
)
def test_a_result_of_another_layout_is_refused(run, tmp_path, change, text):
    path = damaged(run[1], tmp_path / "result.json", change)
    with pytest.raises(RecordError, match=text):
        read_result(path)


def test_a_result_that_is_not_an_object_is_refused(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("[1, 2]")
    with pytest.raises(RecordError, match="schema version None"):
        read_result(path)


def test_paths_of_the_dataset_are_redacted_at_any_depth():
    config = {
        "dataset": {
            "_target_": "medlite.data.folder.ImageFolder",
            "root": "jane_doe",
            "labels": ["/data/a.txt", "~/b", "c.csv"],
            "nested": {"mask_dir": "masks", "flag": "retinamnist", "size": 28},
        },
        "model": {"_target_": "medlite.models.UNet"},
    }
    assert redact_paths(config) == {
        "dataset": {
            "_target_": "medlite.data.folder.ImageFolder",
            "root": "<path>",
            "labels": ["<path>", "<path>", "<path>"],
            "nested": {"mask_dir": "<path>", "flag": "retinamnist", "size": 28},
        },
        "model": {"_target_": "medlite.models.UNet"},
    }
    assert config["dataset"]["root"] == "jane_doe"


def test_the_environment_names_versions_machine_and_seed():
    described = environment.describe_environment(7)
    json.dumps(described, allow_nan=False)
    assert described["seed"] == 7
    assert {"torch", "numpy", "lightning"} <= described["packages"].keys()
    assert described["cpu"]
    assert described["memory_mib"] > 100


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"sse4_2", "avx2"}, True),
        ("x86_64", {"avx2", "avx512_vnni"}, False),
        ("AMD64", {"avx2", "avx_vnni"}, False),
        ("AMD64", None, None),
        ("aarch64", None, False),
    ],
)
def test_processors_that_cut_off_sums_of_8_bit_products_are_known(
    monkeypatch, machine, flags, expected
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(environment, "cpu_flags", lambda: flags)
    assert environment.cuts_off_int8_sums() is expected


def test_the_commit_and_uncommitted_changes_are_seen(tmp_path):
    assert environment.git_state(tmp_path) is None

    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    (tmp_path / "file").write_text("one")
    git("init", "-q")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    state = environment.git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert not state["is_dirty"]
    (tmp_path / "file").write_text("two")
    assert environment.git_state(tmp_path)["is_dirty"]


def test_the_shares_of_labels_that_exclude_nothing_are_those_of_the_images(tmp_path):
    result = make_run(tmp_path, task="classification")
    names, train = result.dataset["class_names"], result.dataset["num_samples"]["train"]
    changed = {"labels": "multilabel", "class_counts": [train // 2] * len(names)}
    dataset = {**result.dataset, **changed}
    fields = {
        field.label: field for field in task_fields(dataclasses.replace(result, dataset=dataset))
    }
    assert fields["Class imbalance"].value.count("(50.0%)") == len(names)


def test_brackets_in_a_message_are_no_markup(tmp_path, capsys):
    result = make_run(tmp_path)
    failed = dataclasses.replace(result, failures={"onnxruntime": "cannot open [/home/model]"})
    print_summary(failed, console())
    assert "cannot open [/home/model]" in capsys.readouterr().out


def test_the_fake_run_of_these_tests_has_no_two_measurements_of_one_name(tmp_path):
    names = [measurement.name for measurement in make_run(tmp_path).measurements]
    assert len(set(names)) == len(names)


def test_teachers_are_named_without_where_they_lie():
    teachers = ["unet", "timm/resnet18", "unet@jane_doe/best.ckpt", "outputs/runs/jane_doe"]
    config = {"compression": {"distill": {"teacher": teachers}, "kd": {"teacher": "runs/jane"}}}
    redacted = redact_paths(config)["compression"]
    assert redacted["distill"]["teacher"] == ["unet", "timm/resnet18", "unet@<path>", "<path>"]
    assert redacted["kd"]["teacher"] == "<path>"


def test_a_calibration_set_is_no_larger_than_the_training_set(tmp_path):
    result = make_run(tmp_path)
    result.dataset["num_samples"]["train"] = 210
    result.config["compression"] = {
        "fuse": {"num_checked_images": 16},
        "qat": {"calibration_samples": 256},
    }
    fields = {row.label: row.value for each in build_card(result) for row in each.fields}
    assert fields["Calibration set"] == "qat: 210 images"
