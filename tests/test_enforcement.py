"""How the command ends when the safety gate is enforced."""

import json
import sys

import pytest

from medlite import __main__ as command_line
from medlite.pipeline import run as pipeline

WORDS = ("dataset=phantom", "model=unet", "logger=none")


@pytest.fixture
def end_of(tmp_path, monkeypatch):
    """The exit code of the command whose jobs end in these verdicts, by seed; None: no report."""

    def exit_code(*words, verdicts):
        def fake_job(config):
            config.directory.mkdir(parents=True, exist_ok=True)
            told = verdicts[config.seed]
            record = {"verdict": told if isinstance(told, dict) else {"safety": told}}
            (config.directory / "result.json").write_text(json.dumps(record))
            return config.directory

        monkeypatch.setattr(pipeline, "run", fake_job)
        monkeypatch.setattr(command_line, "_show_sweep", lambda directories: None)
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        with pytest.raises(SystemExit) as ended:
            command_line.main([*WORDS, *words, f"outputs={tmp_path}"])
        return ended.value.code

    return exit_code


@pytest.mark.parametrize(
    ("verdict", "code"), [("FAIL", 3), ("INCONCLUSIVE", 0), ("PASS", 0), ("not compared", 0)]
)
def test_only_fail_ends_in_3_where_it_is_enforced(end_of, verdict, code):
    assert end_of("safety.enforce=true", verdicts=[verdict]) == code


def test_a_deployed_model_that_cannot_run_ends_in_3(end_of, capsys):
    lost = {"safety": "INCONCLUSIVE", "unmeasured": ["openvino"]}
    assert end_of("safety.enforce=true", verdicts=[lost]) == 3
    assert "could not be measured on openvino" in capsys.readouterr().out


def test_fail_ends_in_0_where_it_is_not_enforced(end_of):
    assert end_of(verdicts=["FAIL"]) == 0


def test_a_job_that_stops_before_its_report_is_not_judged_by_an_older_one(end_of):
    words = ("safety.enforce=true", "stages=[train]")
    assert end_of(*words, verdicts=["FAIL"]) == 0


def test_a_sweep_ends_in_3_after_all_of_its_jobs(end_of, tmp_path):
    words = ("-m", "seed=0,1,2", "safety.enforce=true")
    assert end_of(*words, verdicts=["PASS", "FAIL", "PASS"]) == 3
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 3


def test_a_sweep_without_fail_ends_in_0(end_of):
    words = ("-m", "seed=0,1", "safety.enforce=true")
    assert end_of(*words, verdicts=["PASS", "INCONCLUSIVE"]) == 0
