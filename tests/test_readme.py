"""What README shows works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from medlite.__main__ import VERBS
from medlite.command_line import (
    conf_directory,
    expand_seeds,
    find_options,
    prepare_overrides,
    split_verb,
)
from medlite.errors import RecordError
from medlite.search.command import parse_arguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python -m medlite(.*)$", README, flags=re.MULTILINE)
OPTIONS = find_options([conf_directory()])


def test_it_is_short():
    assert README.count("\n") < 150


def test_commands_are_found():
    assert len(COMMANDS) >= 5


def commands_of(*verbs):
    """The words behind the verb, of README's commands."""
    split = [split_verb(command.split(), VERBS) for command in COMMANDS]
    assert {verb for verb, _ in split} == set(VERBS), "every verb is shown"
    return [pytest.param(verb, rest, id=" ".join(rest)) for verb, rest in split if verb in verbs]


@pytest.mark.parametrize(("verb", "rest"), commands_of("compare", "gate"))
def test_verbs_on_records_ask_for_nothing_but_the_records(verb, rest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecordError, match="outputs/runs"):
        VERBS[verb](rest)


@pytest.mark.parametrize(("verb", "rest"), commands_of("search"))
def test_the_search_is_understood(verb, rest):
    options, overrides = parse_arguments(rest)
    assert options.steps
    assert prepare_overrides(overrides, OPTIONS)


@pytest.mark.parametrize(("verb", "rest"), commands_of("audit"))
def test_the_audit_names_models(verb, rest):
    (word,) = rest
    assert set(word.removeprefix("model=").split(",")) <= set(OPTIONS["model"])


@pytest.mark.parametrize(("verb", "rest"), commands_of("run"))
def test_every_job_composes(verb, rest):
    OmegaConf.register_new_resolver("run_name", lambda: "readme", replace=True)
    prepared = prepare_overrides(expand_seeds(rest), OPTIONS)
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        compose("config", [word for word in prepared if "," not in word and word != "-m"])


def test_every_option_is_named():
    for group, names in OPTIONS.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{group}`"))
        assert all(f"`{name}`" in row for name in names), group


@pytest.fixture
def two_files(tmp_path):
    """A folder with README's model and its options."""
    python = re.search(r"```python\n# my_package/tiny.py\n(.*?)```", README, re.DOTALL).group(1)
    yaml = re.search(r"```yaml\n# my_conf/model/tiny.yaml\n(.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "tiny.py").write_text(python)
    (tmp_path / "my_conf" / "model").mkdir(parents=True)
    (tmp_path / "my_conf" / "model" / "tiny.yaml").write_text(yaml)
    return tmp_path


def run_medlite(folder, words):
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "medlite", *words], cwd=folder, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def test_the_model_of_two_files_trains(two_files):
    words = (
        "--config-dir", "my_conf", "model=tiny", "dataset=phantom", "train.epochs=1",
        "stages=[train]", "compression=none", "logger=none",
    )  # fmt: skip
    done = run_medlite(two_files, words)
    assert done.returncode == 0, done.stderr[-800:]
    assert list(two_files.glob("outputs/store/phantom-tiny-*/weights.pt"))


def test_the_command_for_the_model_of_two_files_can_be_planned(two_files):
    (command,) = re.findall(r"`python -m medlite (--config-dir my_conf [^`]*)`", README)
    done = run_medlite(two_files, [*command.split(), "stages=[]"])
    assert done.returncode == 0, done.stdout[-800:]
    assert "qat" in done.stdout


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all(target in shown.stdout for target in targets.group(1).split())
