"""Whole jobs, from the command line's words to the record, on procedural images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from medlite.command_line import conf_directory, find_options, prepare_overrides
from medlite.config import check
from medlite.errors import ConfigError, MedliteError, RecordError, TrainingError
from medlite.gate.command import main as gate
from medlite.pipeline.run import run
from medlite.report.examples import read_examples
from medlite.report.result import SCHEMA_PATH, read_result
from medlite.safety.corruptions import SUITES
from medlite.safety.image_quality import QUALITIES
from medlite.store import exclusive

ROOT = Path(__file__).parent.parent
OPTIONS = find_options([conf_directory()])
SMALL = (
    "dataset=phantom", "dataset.num_train=32", "dataset.num_val=8", "dataset.num_test=16",
    "model=unet", "model.features=[4,4,8,8,8,4]",
    "train.epochs=2", "train.batch_size=8", "logger=none", "robustness.enabled=false",
    "shortcuts.enabled=false", "explainability.enabled=false",
)  # fmt: skip
QUICK_BENCH = (
    "benchmark.num_queries=20", "benchmark.num_rounds=2", "benchmark.num_warmup=2",
    "benchmark.throughput_seconds=0.1",
)  # fmt: skip

SMALL_GROUPS = ("compression.prune.round_to=1",)


def run_words(outputs, *words, name="job"):
    """Compose as the command line does, then run in this process."""
    OmegaConf.register_new_resolver("run_name", lambda: name, replace=True)
    words = prepare_overrides([*SMALL, *words, f"outputs={outputs}"], OPTIONS)
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        cfg = compose("config", words)
    config = check(
        cfg,
        choices={"dataset": "phantom", "model": "unet"},
        options=OPTIONS,
        directories=[conf_directory()],
    )
    return run(config)


def command(outputs, *words):
    return [sys.executable, "-m", "medlite", *SMALL, *words, f"outputs={outputs}"]


def run_command(outputs, *words, environment=None):
    return subprocess.run(
        command(outputs, *words),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    words = (
        "compression=qat", "compression.qat.epochs=1", "logger=wandb", *QUICK_BENCH,
        "robustness.enabled=true", "shortcuts.enabled=true", "explainability.enabled=true",
        "explainability.num_images=2",
    )  # fmt: skip
    return run_words(outputs, *words), words


def stored_weights(outputs):
    return {
        path.parent.name: path.stat().st_mtime_ns for path in outputs.glob("store/*/weights.pt")
    }


def test_a_job_ends_in_a_record_that_fits_the_schema(finished):
    directory, _ = finished
    plain = json.loads((directory / "result.json").read_text())
    jsonschema.validate(plain, json.loads(SCHEMA_PATH.read_text()))


def test_a_quantised_job_computes_in_integers_on_both_runtimes(finished):
    result = read_result(finished[0] / "result.json")
    values = {m.name: m.value for m in result.measurements}
    assert values["operators/onnxruntime/int8_count"] > 0
    assert values["operators/openvino/int8_count"] > 0
    assert result.verdict["parity"] == "PASS"


def test_metrics_stand_for_torch_and_for_each_runtime_and_for_the_baseline(finished):
    names = {m.name for m in read_result(finished[0] / "result.json").measurements}
    for prefix in ("test", "test/onnxruntime", "test/openvino"):
        assert {f"{prefix}/dice", f"baseline/{prefix}/dice"} <= names


def test_the_safety_gate_judges_every_runtime(finished):
    result = read_result(finished[0] / "result.json")
    assert set(result.safety) == {"onnxruntime", "openvino"}
    assert result.verdict["safety"] in ("PASS", "FAIL", "INCONCLUSIVE")


def test_a_run_keeps_what_the_gate_needs_to_compare_it_again(finished, tmp_path):
    directory, _ = finished
    words = [f"{directory}@baseline/openvino", f"{directory}@openvino"]
    gate([*words, "--json", str(tmp_path / "gate.json")])
    again = json.loads((tmp_path / "gate.json").read_text())["report"]
    recorded = read_result(directory / "result.json").safety["openvino"]
    assert again["num_groups"] == recorded["num_groups"]
    after = {item["name"]: item["compressed"] for item in recorded["items"]}
    assert {item["name"]: item["compressed"] for item in again["items"]} == after


def test_both_models_meet_the_same_corruptions_on_every_runtime_once(finished):
    directory, _ = finished
    result = read_result(directory / "result.json")
    assert set(result.robustness) == {"onnxruntime", "openvino"}
    for report in result.robustness.values():
        assert report["num_images"] == 16
        assert len(report["rows"]) == len(SUITES["phantom"]) * 3
        assert all(row["baseline"] is not None for row in report["rows"])
    kept = json.loads((directory / "bench" / "robustness.json").read_text())["value"]
    assert kept == result.robustness


def test_both_models_are_explained_and_probed_for_shortcuts_on_every_runtime(finished):
    directory, _ = finished
    result = read_result(directory / "result.json")
    places = [(row["method"], row["where"]) for row in result.explanations["rows"]]
    inside = [(method, "torch") for method in ("integrated_gradients", "grad_cam", "rollout")]
    assert places == [("occlusion", "onnxruntime"), ("occlusion", "openvino"), *inside]
    assert all(row["num_images"] == 2 for row in result.explanations["rows"][:4])
    assert set(result.shortcuts) == {"onnxruntime", "openvino"}
    assert [row["probe"] for row in result.shortcuts["openvino"]["rows"]] == ["finding_hidden"]


def test_failures_are_told_with_their_pictures(finished):
    directory, _ = finished
    result = read_result(directory / "result.json")
    assert set(result.exemplars) == set(result.failure_modes) == {"onnxruntime", "openvino"}
    for runtime, report in result.failure_modes.items():
        kinds = {group["kind"] for group in report["groups"]}
        assert kinds == {"class", "foreground", *QUALITIES}
        assert set(report["worst"][0]["decisions"]) == {"uncompressed", runtime}
        pictures = read_examples(directory / report["worst_pictures"])
        assert len(pictures.images) == 6
    assert result.exemplars["openvino"]["rule"] == "dice_drop"
    assert "Failure modes" in (directory / "report.html").read_text()


def test_corruptions_can_be_chosen_and_switched_off(tmp_path):
    words = ("compression=none", "runtime=onnxruntime", *QUICK_BENCH)
    chosen = ("robustness.enabled=true", "robustness.corruptions=[blur]",
              "robustness.severities=[2]", "robustness.num_images=5")  # fmt: skip
    one = read_result(run_words(tmp_path, *words, *chosen, name="one") / "result.json")
    report = one.robustness["onnxruntime"]
    assert [(row["corruption"], row["severity"]) for row in report["rows"]] == [("blur", 2)]
    assert (report["num_images"], report["verdict"], report["items"]) == (5, None, [])
    off = run_words(tmp_path, *words, "robustness.enabled=false", name="off")
    assert read_result(off / "result.json").robustness == {}


def test_a_corruption_that_does_not_exist_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="'blurr', did you mean 'blur'"):
        run_words(tmp_path, "robustness.corruptions=[blurr]")
    assert not stored_weights(tmp_path)


def test_no_stages_tell_what_the_steps_would_do_and_train_nothing(tmp_path, capsys):
    steps = (
        "compression=[prune,distill,qat]",
        *SMALL_GROUPS,
        "compression.qat.keep_float=[conv_0]",
    )
    directory = run_words(tmp_path, *steps, "stages=[]")
    shown = " ".join(capsys.readouterr().out.split())
    assert "prune: pruning: ratio 0.5 by magnitude in" in shown
    assert "distill: distillation: teacher MonaiNetwork" in shown
    assert "qat: quantisation: INT8 in" in shown
    assert "qat: kept in float: 10 conv, net.final_conv" in shown
    assert "| qat | quantisation | INT8 in" in (directory / "plan.md").read_text()
    assert "bench │ 200 queries" in shown
    assert "images through 7 nets of torch" in shown
    assert not list(tmp_path.glob("store/*/weights.pt"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("compression=half", "compression.half.dtype=bfloat16", "runtime=onnxruntime"),
            "runtime=onnxruntime, compression=half: ONNX Runtime's CPU kernels lack bfloat16",
        ),
        (
            ("compression=ptq", "compression.ptq.weight_bits=4", "runtime=executorch"),
            "runtime=executorch, compression=ptq: ExecuTorch holds no weights of 4 bits alone",
        ),
    ],
)
def test_what_a_runtime_cannot_hold_is_told_before_training(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        run_words(tmp_path, *words)
    assert not list(tmp_path.glob("store/*/weights.pt"))


def test_the_plan_counts_the_trials_of_a_search_for_precision(tmp_path, capsys):
    words = ("compression=selective_ptq", "compression.selective_ptq.max_float_layers=1")
    run_words(tmp_path, *words, *SMALL_GROUPS, "stages=[]")
    # each of 22 layers alone, and 2 x 2 to choose
    assert "up to 26 trials on" in " ".join(capsys.readouterr().out.split())


def test_a_plan_follows_its_settings(tmp_path):
    words = ("compression=prune", *SMALL_GROUPS, "stages=[train,compress]", "control=false")
    for ratio in (0.5, 0.25):
        directory = run_words(tmp_path, *words, f"compression.prune.ratio={ratio}")
        assert f"ratio {ratio} by magnitude" in (directory / "plan.md").read_text()


def test_what_a_step_cannot_do_is_told_before_anything_is_trained(tmp_path):
    with pytest.raises(MedliteError, match="keep_float: no layer is called 'hed'"):
        run_words(tmp_path, "compression=[prune,ptq]", "compression.ptq.keep_float=[hed]",
                  *SMALL_GROUPS)  # fmt: skip
    assert not (tmp_path / "store").exists()


def test_a_float_net_that_was_trained_as_long_stands_beside_the_compressed_one(finished):
    result = read_result(finished[0] / "result.json")
    assert set(result.control) == {"onnxruntime", "openvino"}
    values = {m.name: m.value for m in result.measurements}
    (item,) = [i for i in result.control["openvino"]["items"] if i["name"] == "safety/metric_drop"]
    assert item["baseline"] == pytest.approx(values["control/test/dice"])
    assert item["compressed"] == pytest.approx(values["test/openvino/dice"])
    assert result.history["qat"] != result.history["baseline"]
    assert "Against as much further training" in (finished[0] / "card.md").read_text()


def test_the_lineage_says_what_each_stage_left(finished):
    result = read_result(finished[0] / "result.json")
    trained, quantised = result.lineage
    assert (trained["stage"], quantised["stage"]) == ("train", "qat")
    values = {m.name: m.value for m in result.measurements}
    assert trained["scores"]["dice"] == pytest.approx(values["baseline/test/dice"])
    assert quantised["scores"]["dice"] == pytest.approx(values["test/dice"])
    assert trained["params"] == values["baseline/complexity/params"]
    assert quantised["weight_bytes"] < 0.8 * trained["weight_bytes"]
    assert trained["sha256"] != quantised["sha256"]
    assert "largest loss of a class" in (finished[0] / "report.html").read_text()


def test_one_control_serves_all_steps_that_train_as_long(tmp_path):
    settings = ("epochs=1", "learning_rate=1e-4")
    for step in ("qat", "prune"):
        words = [f"compression.{step}.{setting}" for setting in settings]
        words += SMALL_GROUPS if step == "prune" else ()
        run_words(tmp_path, f"compression={step}", *words, "stages=[train,compress]", name=step)
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "store").iterdir())
    assert names.count("phantom-unet+finetune") == 1
    assert {"phantom-unet+qat", "phantom-unet+prune"} <= set(names)


def test_a_fine_tuning_and_its_control_are_one(tmp_path):
    words = ("compression=[finetune,ptq]", "compression.finetune.epochs=1")
    run_words(tmp_path, *words, "stages=[train,compress]")
    names = [path.name.rpartition("-")[0] for path in (tmp_path / "store").iterdir()]
    assert names.count("phantom-unet+finetune") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("compression=ptq",),
        ("compression=finetune", "compression.finetune.epochs=1"),
        ("compression=prune", "compression.prune.epochs=1", *SMALL_GROUPS, "control=false"),
    ],
    ids=["nothing is trained", "nothing else is done", "switched off"],
)
def test_no_control_is_trained_where_it_would_say_nothing(tmp_path, words):
    run_words(tmp_path, *words, "stages=[train,compress]")
    step = words[0].partition("=")[2]
    names = {path.name.rpartition("-")[0] for path in (tmp_path / "store").iterdir()}
    assert names == {"phantom-unet", f"phantom-unet+{step}"}


def test_card_and_page_are_written(finished):
    assert "Numerical precision" in (finished[0] / "card.md").read_text()
    assert "</html>" in (finished[0] / "report.html").read_text()


def test_no_patient_goes_to_the_record_or_to_wandb(finished):
    directory, _ = finished
    splits = json.loads((directory / "splits.json").read_text())
    patient = splits["test"][0]
    sent = [directory / "result.json", *(directory / "wandb").rglob("*")]
    assert len(sent) > 3
    for path in sent:
        if path.is_file():
            assert patient.encode() not in path.read_bytes(), path


def test_the_same_job_again_does_nothing(finished):
    directory, words = finished
    before = (directory / "result.json").stat().st_mtime_ns
    run_words(directory.parent.parent, *words)
    assert (directory / "result.json").stat().st_mtime_ns == before


def test_another_compression_reuses_the_trained_baseline(finished):
    directory, _ = finished
    outputs = directory.parent.parent
    before = stored_weights(outputs)
    other = run_words(outputs, "compression=none", *QUICK_BENCH, name="uncompressed")
    assert stored_weights(outputs) == before
    assert read_result(other / "result.json").verdict["safety"] == "not compared"


def test_distillation_trains_its_teacher_once(tmp_path):
    words = (
        "compression=distill", "compression.distill.epochs=1", "stages=[train,compress]",
        "compression.distill.teacher=unet",
    )  # fmt: skip
    run_words(tmp_path, *words)
    before = stored_weights(tmp_path)
    run_words(tmp_path, *words, "compression.distill.alpha=0.7", name="other")
    after = stored_weights(tmp_path)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1


def test_a_model_for_another_task_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"is for classification, .* is for segmentation: try"):
        run_words(
            tmp_path, "~model.features", "~model.act", "~model.norm", "~model.upsample",
            "model._target_=medlite.models.timm_classifier.TimmClassifier", "model.name=resnet18",
        )  # fmt: skip


def test_an_illegal_order_of_steps_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="'prune' cannot follow 'qat'"):
        run_words(tmp_path, "compression=[qat,prune]")


def test_a_run_directory_in_use_is_refused(tmp_path):
    with (
        exclusive(tmp_path / "runs" / "job"),
        pytest.raises(RecordError, match="another process is working"),
    ):
        run_words(tmp_path, "stages=[train]")


class Malicious:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_malicious_checkpoint_is_refused_and_does_not_run(tmp_path, capsys):
    run_words(tmp_path, "compression=none", "stages=[train]")
    (weights,) = tmp_path.glob("store/*/weights.pt")
    torch.save({"weights": Malicious(), "state": None}, weights)
    with pytest.raises(RecordError, match="could run code when loaded"):
        run_words(tmp_path, "compression=none", "stages=[train]")
    assert "this ran" not in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_with_its_batch(tmp_path):
    with pytest.raises(TrainingError, match=r"epoch \d+, batch \d+ .*lower train\.learning_rate"):
        run_words(tmp_path, "stages=[train]", "train.learning_rate=1e30", "train.epochs=20")


def final_weights(outputs):
    (path,) = outputs.glob("store/*/weights.pt")
    return torch.load(path, weights_only=True)["weights"]


@pytest.mark.slow
def test_a_killed_job_resumes_and_ends_in_the_same_weights(tmp_path):
    words = ("stages=[train]", "compression=none", "train.epochs=15", "dataset.num_train=128")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen(
        command(killed, *words), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not list(killed.glob("store/*/fit/last.ckpt")):
            assert time.monotonic() < deadline, "no checkpoint was written"
            assert process.poll() is None, "the job ended before it could be killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not list(killed.glob("store/*/weights.pt"))
    assert run_command(killed, *words).returncode == 0
    assert run_command(whole, *words).returncode == 0
    first, second = final_weights(killed), final_weights(whole)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_leaves_no_half_files(small_disk):
    done = run_command(
        small_disk, "stages=[train]", "compression=none", "model.features=[32,32,32,32,32,32]"
    )
    assert done.returncode == 1
    assert "no space left on the disk" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(small_disk.rglob("*.partial"))
    assert not list(small_disk.glob("store/*/entry.json"))


def test_a_failing_job_of_a_sweep_leaves_the_others_and_is_told_in_its_own_log(tmp_path):
    words = ("stages=[train]", "compression=none", "-m")
    done = run_command(tmp_path, *words, "train.loss=dice_ce,focl,dice_focal")
    assert done.returncode == 1
    assert len(stored_weights(tmp_path)) == 2
    logs = [path.read_text() for path in tmp_path.glob("runs/*/medlite.log")]
    assert len(logs) == 3
    assert sum("did you mean 'focal'" in log and "Traceback" in log for log in logs) == 1
    before = stored_weights(tmp_path)
    assert run_command(tmp_path, *words, "train.loss=dice_ce,focal").returncode == 0
    after = stored_weights(tmp_path)
    assert before.items() <= after.items()
    assert len(after) == 3
