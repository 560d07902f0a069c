from pathlib import Path

import pytest

from medlite.config_schema import LoggerSettings
from medlite.errors import TrainingError
from medlite.pipeline import loggers


class Config:
    """The parts of a JobConfig that loggers read."""

    name = "job"
    resolved = {"dataset": {"root": "/data/jane_doe"}, "seed": 0}  # noqa: RUF012 - read only

    def __init__(self, directory, kind):
        self.directory = directory
        self.logger = LoggerSettings(kind=kind, group="sweep")


def test_none_logs_nothing(tmp_path):
    with loggers.open_sinks(Config(tmp_path, "none")) as sinks:
        assert sinks.loggers("baseline") == []
        assert sinks.wandb_run is None


def test_csv_keeps_the_curves_of_each_fit_apart(tmp_path):
    with loggers.open_sinks(Config(tmp_path, "csv")) as sinks:
        for name in ("baseline", "qat"):
            (logger,) = sinks.loggers(name)
            logger.log_metrics({"loss": 0.5}, step=0)
            logger.save()
    assert (tmp_path / "curves" / "baseline" / "metrics.csv").exists()
    assert (tmp_path / "curves" / "qat" / "metrics.csv").exists()


def test_the_id_of_a_run_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        loggers._run_id(tmp_path / "wandb_id.txt")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(loggers._run_id(tmp_path / "wandb_id.txt")) == 8


def test_a_resumed_job_stays_one_wandb_run_and_a_failed_one_is_finished(tmp_path):
    def failing():
        with loggers.open_sinks(Config(tmp_path, "wandb")) as sinks:
            ids.append((sinks.wandb_run.id, sinks.wandb_run.group))
            raise TrainingError

    ids = []
    with pytest.raises(TrainingError):
        failing()
    with loggers.open_sinks(Config(tmp_path, "wandb")) as sinks:
        ids.append((sinks.wandb_run.id, sinks.wandb_run.group))
        assert sinks.wandb_run.config["dataset"]["root"] == "<path>"
    assert ids[0] == ids[1]
    assert ids[0][1] == "sweep"
    assert len(list(Path(tmp_path).glob("wandb/offline-run-*"))) >= 1
