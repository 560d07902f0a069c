"""`seeds=N`: the whole job once a seed, from one word on the command line."""

import sys

import pytest

from medlite import __main__ as command_line
from medlite.pipeline import run as pipeline


@pytest.fixture
def jobs_of(tmp_path, monkeypatch):
    """(seed, steps, directory) of each job that the words start, in their order."""

    def jobs(*words):
        started = []

        def fake_job(config):
            started.append((config.seed, list(config.compression), config.directory))

        monkeypatch.setattr(pipeline, "run", fake_job)
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        with pytest.raises(SystemExit) as ended:
            command_line.main(["dataset=phantom", "model=unet", *words, f"outputs={tmp_path}"])
        assert ended.value.code == 0
        return started

    return jobs


def test_the_job_is_run_once_a_seed_in_directories_of_their_own(jobs_of):
    started = jobs_of("compression=ptq", "seeds=3")
    assert [seed for seed, *_ in started] == [0, 1, 2]
    assert len({directory for *_, directory in started}) == 3


def test_seeds_combine_with_other_sweeps_and_count_on_from_the_first(jobs_of):
    started = jobs_of("-m", "compression=none,ptq", "seed=4", "seeds=2")
    found = {(seed, *steps) for seed, steps, _ in started}
    assert found == {(4,), (5,), (4, "ptq"), (5, "ptq")}


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "seed=0,1"),
        ("--multirun", "compression=none,ptq"),
        ("hydra.mode=MULTIRUN", "seed=0,1"),
        ("experiment=compression_ladder",),
    ],
)
def test_one_name_for_all_jobs_of_a_sweep_is_refused(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    with pytest.raises(SystemExit) as ended:
        command_line.main([*words, "name=mine", f"outputs={tmp_path}"])
    assert ended.value.code == 2
    assert "name=mine: all jobs of the sweep would share this" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["name=a,b", "name=x-${seed}"])
def test_a_name_that_differs_from_job_to_job_is_taken(jobs_of, name):
    started = jobs_of("-m", "seed=0,1", name, "compression=none")
    assert len({directory for *_, directory in started}) == 2


def test_a_directory_is_named_after_the_steps_that_were_chosen(jobs_of):
    ((_, _, plain),) = jobs_of("compression=none")
    ((_, steps, tuned),) = jobs_of("compression=none", "compression.prune.ratio=.3")
    assert (steps, tuned) == ([], plain)
    assert plain.name.startswith("phantom-unet-none-")


def test_seeds_combine_with_an_experiment_that_sweeps(jobs_of):
    started = jobs_of("experiment=compression_ladder", "compression=none,ptq", "seeds=2")
    assert [seed for seed, *_ in started] == [0, 1, 0, 1]


def test_levels_on_the_command_line_replace_those_of_the_experiment(jobs_of):
    words = ("experiment=forgettability", "compression.sparsify.sparsity=0.5,0.9", "seeds=2")
    assert [(seed, steps) for seed, steps, _ in jobs_of(*words)] == [
        (0, ["sparsify"]), (1, ["sparsify"]), (0, ["sparsify"]), (1, ["sparsify"])
    ]  # fmt: skip
