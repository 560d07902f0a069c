"""What each step of a recipe brings is measured beside what came into it."""

import dataclasses
import json

import jsonschema
import pytest
from test_pipeline import QUICK_BENCH, SMALL_GROUPS, run_words

from medlite.errors import ExportError
from medlite.pipeline import step_gains
from medlite.report.result import SCHEMA_PATH, read_result

RECIPE = (
    "compression=[finetune,prune]", "compression.finetune.epochs=1", "compression.prune.epochs=1",
    "model.features=[16,16,32,32,32,16]", *SMALL_GROUPS, *QUICK_BENCH, "control=false",
    "runtime=onnxruntime",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_words(tmp_path_factory.mktemp("gains"), *RECIPE)


def gains_of_steps(directory):
    return {row["stage"]: row["gains"] for row in read_result(directory / "result.json").lineage}


def test_each_step_is_measured_beside_what_came_into_it(finished):
    gains = gains_of_steps(finished)
    assert list(gains) == ["train", "finetune", "prune"]
    assert gains["train"] == {}
    assert gains["finetune"]["onnxruntime"]["size_ratio"] == pytest.approx(1, abs=0.01)
    assert gains["prune"]["onnxruntime"]["size_ratio"] < 0.6
    low, high = gains["prune"]["onnxruntime"]["interval"]
    assert 0 < low <= gains["prune"]["onnxruntime"]["speedup"] <= high
    plain = json.loads((finished / "result.json").read_text())
    jsonschema.validate(plain, json.loads(SCHEMA_PATH.read_text()))


def test_the_page_says_what_each_step_brought(finished):
    page = (finished / "report.html").read_text()
    assert "beside what came into it" in page
    assert "times as fast" in page


def test_what_was_measured_is_not_measured_again(finished, monkeypatch):
    before = gains_of_steps(finished)
    monkeypatch.setattr(step_gains, "benchmark", None)
    (finished / "done").unlink()
    run_words(finished.parents[1], *RECIPE)
    assert gains_of_steps(finished) == before


def test_a_net_that_cannot_be_exported_is_told_and_stops_nothing(finished, monkeypatch):
    def refuse(*_arguments, **_options):
        message = "no such operator"
        raise ExportError(message)

    monkeypatch.setattr(step_gains, "export_all", refuse)
    (finished / "bench" / "steps.json").unlink()
    (finished / "done").unlink()
    run_words(finished.parents[1], *RECIPE)
    gains = gains_of_steps(finished)
    assert {gains[step]["onnxruntime"]["reason"] for step in ("finetune", "prune")} == {
        "no such operator"
    }


def test_it_can_be_switched_off(finished):
    switch = "benchmark.each_step=false"
    directory = run_words(finished.parents[1], *RECIPE, switch, name="off")
    assert set(map(str, gains_of_steps(directory).values())) == {"{}"}
    assert not (directory / "bench" / "steps.json").exists()


def test_a_single_step_takes_the_benchmark_of_the_run():
    step = dataclasses.make_dataclass("Trained", ["key"])("k")
    job = dataclasses.make_dataclass("Job", ["runtimes"])({"onnxruntime": None})
    gains = step_gains.measure_steps(job, {"prune": step}, {}, [])
    assert gains["prune"]["onnxruntime"]["reason"] == "not timed"
