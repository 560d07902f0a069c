"""Exported models are found again where the run directory is, however its path is typed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from medlite.pipeline import measuring
from medlite.types import Artifact


@pytest.fixture
def exported(monkeypatch):
    """The run directory -> its artifact; and how often something was exported."""
    exports = []

    def fake_export(net, *, formats, input_shape, directory, stem):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{stem}.fake"
        path.write_bytes(b"model")
        exports.append(path)
        artifact = Artifact(
            path=path, files=(path,), format="fake", input_shape=(1, 4, 4), output_shape=(2,),
            precision="fp32", num_bytes=5, sha256="",
        )  # fmt: skip
        return {"fake": artifact}

    monkeypatch.setattr(measuring, "export_all", fake_export)

    def export(directory):
        job = SimpleNamespace(
            config=SimpleNamespace(directory=directory),
            runtimes={"fake": SimpleNamespace(format="fake")},
            spec=SimpleNamespace(input_shape=(1, 4, 4)),
        )
        return measuring.export_models(job, {"": None}, "key")[""]["fake"]

    return export, exports


def test_the_file_holds_no_path_outside_of_the_run_directory(exported, tmp_path):
    export, _ = exported
    export(tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "artifacts.json").read_text())["value"]
    assert kept[""]["fake"]["path"] == "artifacts/model.fake"
    assert kept[""]["fake"]["files"] == ["artifacts/model.fake"]


def test_a_moved_run_finds_its_models(exported, tmp_path):
    export, exports = exported
    export(tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert export(moved).path == moved / "artifacts" / "model.fake"
    assert len(exports) == 1


def test_a_run_finds_its_models_under_a_relative_path(exported, tmp_path, monkeypatch):
    export, exports = exported
    export(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert export(Path("run")).path == Path("run/artifacts/model.fake")
    assert len(exports) == 1


def test_a_model_that_is_gone_is_exported_again(exported, tmp_path):
    export, exports = exported
    export(tmp_path / "run").path.unlink()
    assert export(tmp_path / "run").path.exists()
    assert len(exports) == 2
