import copy
import json
import time

import pytest

from medlite.report.examples import read_examples
from medlite.report.redact import redact_paths
from medlite.report.wandb_lineage import log_lineage
from medlite.report.wandb_sink import example_images, log_to_wandb, summary_of

wandb = pytest.importorskip("wandb")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_run_is_logged_offline_with_nothing_that_names_a_patient(finished, offline, task):
    result, directory = finished[task]
    run = wandb.init(
        project="medlite", dir=offline, config=redact_paths(result.config), mode="offline"
    )
    log_to_wandb(run, result, directory, weights={})
    summary = dict(run.summary)
    run.finish()
    assert summary["latency/onnxruntime/p50_ms"] == pytest.approx(3.0, abs=0.2)
    assert summary["verdict/safety"] == result.verdict["safety"]
    logged = [path for path in offline.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in logged)
    assert any(path.suffix == ".png" for path in logged)
    for path in logged:
        content = path.read_bytes()
        assert b"jane_doe" not in content, path
        assert b"patient 3" not in content, path


def test_the_summary_holds_every_value_that_there_is(run):
    result, _ = run
    summary = summary_of(result)
    measured = {m.name: m.value for m in result.measurements if m.value is not None}
    assert measured.items() <= summary.items()
    assert "energy/onnxruntime/net_mj_per_image" not in summary
    json.dumps(summary, allow_nan=False)


def test_the_summary_holds_every_loss_of_the_gate_and_its_verdict(finished):
    result, _ = finished["classification"]
    summary, report = summary_of(result), result.safety["openvino"]
    shown = {loss["name"]: loss["difference"] for loss in report["shown"]}
    name = "specificity_drop/proliferative"
    assert summary[f"safety/openvino/{name}"] == shown[f"safety/{name}"]
    assert f"verdict/safety/openvino/{name}" not in summary
    judged = {item["name"]: item for item in report["items"]}
    item = judged["safety/sensitivity_drop/proliferative"]
    assert summary["safety/openvino/sensitivity_drop/proliferative"] == item["difference"]
    assert summary["verdict/safety/openvino/sensitivity_drop/proliferative"] == item["verdict"]


def test_classified_examples_say_what_is_true_and_what_was_said(finished):
    result, directory = finished["classification"]
    images = example_images(read_examples(directory / "examples.npz"), result.dataset)
    assert len(images) == 6
    assert images[0]._caption.startswith("true: ")
    assert "deployed: " in images[0]._caption


def test_logging_leaves_the_result_as_it_was(run, offline):
    result, directory = run
    before = copy.deepcopy(result)
    active = wandb.init(project="medlite", dir=offline, mode="offline")
    log_to_wandb(active, result, directory, weights={})
    active.finish()
    assert result == before


class RecordingRun:
    """Keeps the order of what is logged and used, as an online or offline run would take it."""

    def __init__(self, offline):
        self.offline, self.calls = offline, []

    def log_artifact(self, artifact):
        artifact.wait = lambda: artifact
        self.calls.append(("log", artifact.name))
        self.last = artifact
        return artifact

    def use_artifact(self, artifact):
        self.calls.append(("use", artifact.name))


@pytest.mark.parametrize("is_offline", [True, False])
def test_each_stage_is_an_artifact_made_of_the_one_before(run, offline, is_offline):
    result, _ = run
    weights = {}
    for row in result.lineage:
        weights[row["key"]] = offline / f"{row['stage']}.pt"
        weights[row["key"]].write_bytes(row["stage"].encode())
    recording = RecordingRun(is_offline)
    log_lineage(recording, result.lineage, weights)
    train, qat = "stage-lidc_nodules-net.train-91be", "stage-lidc_nodules-net.qat-91be"
    linked = [] if is_offline else [("use", train)]
    assert recording.calls == [("log", train), *linked, ("log", qat)]
    assert recording.last.metadata["parent"] == train
    assert recording.last.metadata["scores"]["ece"] == 0.04
    assert list(recording.last.manifest.entries) == ["weights.pt"]


def all_bytes(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*.wandb"))


def wait_for(condition, seconds=20):
    """W&B's own process writes its file, and on a busy machine after `finish` has returned."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_an_offline_run_takes_the_stages(run, offline):
    result, _ = run
    file = offline / "weights.pt"
    file.write_bytes(b"tensors")
    active = wandb.init(project="medlite", dir=offline, mode="offline")
    log_lineage(active, result.lineage, {row["key"]: file for row in result.lineage})
    active.finish()
    assert wait_for(lambda: b"stage-lidc_nodules-net.qat-91be" in all_bytes(offline))
