"""Teachers of every kind, from the words that name them to the weights that they give."""

import json
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from test_pipeline import SMALL_GROUPS, run_words, stored_weights
from torch import nn

from medlite.command_line import conf_directory
from medlite.config import build, model_config
from medlite.data.phantom import phantom
from medlite.errors import ConfigError, MedliteError, RecordError
from medlite.pipeline import teachers
from medlite.pipeline.state_dicts import load_strictly, read_state_dict
from medlite.pipeline.teachers import file_marks
from medlite.report.result import SCHEMA_PATH, read_result

SHORT = ("control=false", "train.epochs=1", "dataset.num_train=16")
DISTILL = ("compression=distill", "compression.distill.epochs=1", "stages=[train,compress]")
BENCH = (
    "runtime=onnxruntime", "benchmark.num_queries=20", "benchmark.num_rounds=2",
    "benchmark.num_warmup=2", "benchmark.throughput_seconds=0.1",
)  # fmt: skip


def teach(outputs, teacher, *words, name="student"):
    words = (*DISTILL, f"compression.distill.teacher={teacher}", *words)
    return run_words(outputs, *SHORT, *words, name=name)


def plan(outputs, teacher, *words):
    return teach(outputs, teacher, "stages=[]", *words)


def students(outputs):
    return {name for name in stored_weights(outputs) if "distill" in name}


def make_unet(seed=0, **options):
    torch.manual_seed(seed)
    node = model_config("unet", [conf_directory()]) | options
    return build(node, in_channels=1, num_classes=1, spatial_dims=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run that finished, distilled from two teachers, then quantised."""
    outputs = tmp_path_factory.mktemp("teacher")
    torch.save(make_unet().state_dict(), outputs / "weights.pt")
    steps = (
        "compression=[prune,distill,ptq]", "compression.prune.epochs=1", *SMALL_GROUPS,
        f"compression.distill.teacher=[unet@{outputs}/weights.pt,unet]",
        "compression.distill.epochs=1",
    )  # fmt: skip
    return run_words(outputs, *SHORT, *BENCH, *steps, name="teacher")


@pytest.fixture
def checkpoint(tmp_path):
    """Weights of the model option `unet`."""
    path = tmp_path / "weights.pt"
    torch.save(make_unet().state_dict(), path)
    return path


@pytest.mark.slow
def test_a_finished_run_teaches_by_its_last_float_net(finished, tmp_path, capsys):
    teach(tmp_path, finished)
    shown = " ".join(capsys.readouterr().out.split())
    assert "teach │ teacher (distill): finished" in shown
    (name,) = students(tmp_path)
    assert {each.rpartition("-")[0] for each in stored_weights(tmp_path)} == {
        "phantom-unet", "phantom-unet+distill",
    }  # fmt: skip
    record = json.loads((tmp_path / "store" / name / "entry.json").read_text())
    rows = read_result(finished / "result.json").lineage
    assert f"of {rows[1]['params']:,} parameters" in dict(record["notes"])["distillation"]


@pytest.mark.slow
def test_the_net_of_a_run_has_the_weights_that_its_record_names(finished, tmp_path):
    """The same student, taught by the run and by a copy of it elsewhere."""
    elsewhere = tmp_path / "moved"
    shutil.copytree(finished.parents[1], elsewhere)
    shutil.rmtree(elsewhere / "runs" / "teacher" / "artifacts")
    record = elsewhere / "runs" / "teacher" / "result.json"
    weights = []
    for place, teacher in (("one", finished), ("two", record)):
        teach(tmp_path / place, teacher)
        (name,) = students(tmp_path / place)
        path = tmp_path / place / "store" / name / "weights.pt"
        weights.append(torch.load(path, weights_only=True)["weights"])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_checkpoint_teaches_and_other_weights_make_another_student(checkpoint, tmp_path):
    teach(tmp_path, f"unet@{checkpoint}")
    first = students(tmp_path)
    teach(tmp_path, f"unet@{checkpoint}")
    assert students(tmp_path) == first
    torch.save(make_unet(seed=1).state_dict(), checkpoint)
    teach(tmp_path, f"unet@{checkpoint}")
    assert len(students(tmp_path)) == 2


def test_what_a_job_is_known_by_changes_with_its_teachers_file(checkpoint):
    config = SimpleNamespace(compression={"distill": {"teacher": ["unet", f"unet@{checkpoint}"]}})
    first = list(file_marks(config))
    torch.save(make_unet(seed=1).state_dict(), checkpoint)
    assert len(first) == 1
    assert list(file_marks(config)) != first
    assert not list(file_marks(SimpleNamespace(compression={"prune": {"ratio": 0.5}})))


@pytest.mark.slow
def test_the_teachers_own_metrics_stand_beside_its_students(finished):
    result = read_result(finished / "result.json")
    values = {m.name: m.value for m in result.measurements}
    for score in ("dice", "ece", "nll", "sensitivity/lesion_1"):
        assert result.teacher["scores"][score] == pytest.approx(values[f"teacher/test/{score}"])
    assert result.teacher["name"] == "unet@weights.pt and unet"
    size = sum(parameter.numel() for parameter in make_unet().parameters())
    assert result.teacher["params"] == 2 * size
    plain = json.loads((finished / "result.json").read_text())
    jsonschema.validate(plain, json.loads(SCHEMA_PATH.read_text()))
    assert "<h2>Teacher</h2>" in (finished / "report.html").read_text()


def test_several_teachers_are_planned_and_trained_once_each(tmp_path, capsys):
    plan(tmp_path, "[unet,espnet]")
    shown = " ".join(capsys.readouterr().out.split())
    assert "teacher MonaiNetwork and ESPNet of" in shown
    assert "teach │ unet: 1 epoch" in shown
    assert "teach │ espnet: 1 epoch" in shown
    teach(tmp_path, "[unet,espnet]")
    names = {name.rpartition("-")[0] for name in stored_weights(tmp_path)}
    assert {"phantom-unet", "phantom-espnet", "phantom-unet+distill"} == names


@pytest.mark.slow
def test_a_run_of_another_task_teaches_by_its_maps_alone(finished, tmp_path):
    runs = tmp_path / "copy" / "runs" / "teacher"
    runs.mkdir(parents=True)
    plain = json.loads((finished / "result.json").read_text())
    plain["dataset"] |= {"class_names": ["background", "vessel"]}
    (runs / "result.json").write_text(json.dumps(plain))
    shutil.copytree(finished.parents[1] / "store", tmp_path / "copy" / "store")
    with pytest.raises(ConfigError, match=r"the classes of run teacher are \(background, vessel\)"):
        plan(tmp_path, runs)
    maps = ("compression.distill.alpha=0", "compression.distill.feature_weight=1")
    teach(tmp_path, runs, *maps)
    assert students(tmp_path)


@pytest.mark.parametrize(("classes", "answers"), [(None, True), (["background", "vessel"], False)])
def test_a_teacher_of_maps_is_judged_where_its_classes_are_the_jobs(
    tmp_path, monkeypatch, classes, answers
):
    spec = phantom(image_size=(32, 32)).spec
    own = spec if classes is None else replace(spec, class_names=tuple(classes))
    row = {"stage": "train", "key": "net-1", "sha256": "ab"}
    record = SimpleNamespace(lineage=[row], dataset=asdict(own), config={})
    monkeypatch.setattr(teachers, "read_result", lambda _: record)
    monkeypatch.setattr(teachers.Entry, "is_done", True)
    path = tmp_path / "runs" / "teacher" / "result.json"
    path.parent.mkdir(parents=True)
    path.touch()
    step = SimpleNamespace(teacher=str(path.parent), compares_logits=False)
    (found,) = teachers.find_teachers(SimpleNamespace(spec=spec), step)
    assert found.answers is answers


@pytest.mark.slow
def test_a_run_on_images_of_another_size_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"images of run teacher are .*; take a run on the same"):
        plan(tmp_path, finished, "dataset.image_size=[48,48]")


@pytest.mark.slow
def test_a_run_whose_weights_are_gone_is_refused(finished, tmp_path):
    runs = tmp_path / "copy" / "runs" / "teacher"
    runs.mkdir(parents=True)
    shutil.copy(finished / "result.json", runs)
    with pytest.raises(ConfigError, match=r"are not in .*store any more \(phantom-unet-\w+, phan"):
        plan(tmp_path, runs)


def test_a_run_that_never_ended_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"runs/none is no finished run: it has no result\.json"):
        plan(tmp_path, tmp_path / "runs" / "none")


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file nothing\.pt; a checkpoint is named"):
        plan(tmp_path, "unet@nothing.pt")


def test_weights_of_another_net_are_told_before_training(checkpoint, tmp_path):
    with pytest.raises(RecordError, match=r"for model=espnet: the weights do not fit: \d+ missing"):
        plan(tmp_path, f"espnet@{checkpoint}")
    assert not stored_weights(tmp_path)


def test_a_model_for_another_task_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="resnet18 is for classification and would be trained"):
        plan(tmp_path, "resnet18")


def test_timm_networks_come_with_their_weights_or_say_why_not(tmp_path, monkeypatch):
    def offline(*_arguments, **_options):
        raise OSError

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(MedliteError, match=r"weights of 'resnet18\.a1_in1k' could not be downl"):
        plan(tmp_path, "timm/resnet18.a1_in1k")


def test_weights_are_found_in_files_of_every_kind(tmp_path):
    net = nn.Linear(2, 3)
    weights = net.state_dict()
    lightning = {f"net.{key}": value for key, value in weights.items()}
    contents = (
        weights,
        {"state_dict": weights, "epoch": 3},
        {"weights": weights, "state": None},
        {"state_dict": lightning | {"metrics.n": torch.ones(1)}, "pytorch-lightning_version": "2"},
    )
    for content in contents:
        torch.save(content, tmp_path / "file.pt")
        found = read_state_dict(tmp_path / "file.pt")
        assert found.keys() == weights.keys()
        assert torch.equal(found["weight"], net.weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds no weights: expected a state dict"),
        ({"epoch": 3}, "holds no weights: expected a state dict"),
        ({"weights": {"a": torch.ones(1)}, "state": {"cut": 1}}, "holds a compressed net; name"),
        ({"net": nn.Linear(2, 2)}, r"could run code when loaded; save its state_dict\(\) alone"),
    ],
)
def test_files_without_weights_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(RecordError, match=message):
        read_state_dict(tmp_path / "file.pt")


def test_what_does_not_fit_is_listed():
    weights = {"weight": torch.ones(3, 2), "scale": torch.ones(1)}
    message = (
        r"^teacher: the weights do not fit: 1 missing \(bias\); 1 unknown \(scale\); "
        r"1 of another shape \(weight \(3, 2\) instead of \(4, 2\)\)$"
    )
    with pytest.raises(RecordError, match=message):
        load_strictly(nn.Linear(2, 4), weights, whose="teacher")
