"""The search for recipes: valid orders only, the frontier found, and nothing done twice."""

from itertools import permutations
from types import SimpleNamespace

import pytest

from medlite.compression.low_rank import LowRank
from medlite.compression.pruning import StructuredPruning
from medlite.compression.quantization import PostTrainingQuantization, QuantizationAwareTraining
from medlite.errors import ConfigError, MedliteError, RecordError
from medlite.search import command
from medlite.search.command import main
from medlite.search.search import JobStopped, Outcome, Search
from medlite.search.space import build_space

pytest.importorskip("optuna")

STEPS = {
    "prune": StructuredPruning,
    "low_rank": LowRank,
    "ptq": PostTrainingQuantization,
    "qat": QuantizationAwareTraining,
}


def test_the_space_holds_every_valid_order_and_no_other():
    space = build_space(STEPS, max_steps=3)
    numeric = {"ptq", "qat"}
    expected = {
        order
        for length in (1, 2, 3)
        for order in permutations(STEPS, length)
        if not set(order[:-1]) & numeric
    }
    assert set(space.recipes) == expected
    assert len(space.recipes) == 4 + 6 + 4


def test_settings_count_only_where_their_step_is():
    settings = ["compression.prune.ratio=.3,.5", "train.epochs=1,2,3"]
    space = build_space({"prune": StructuredPruning, "ptq": PostTrainingQuantization},
                        max_steps=2, settings=settings)  # fmt: skip
    assert space.recipes == (("prune",), ("ptq",), ("prune", "ptq"))
    assert space.size == 2 * 3 + 3 + 2 * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["compression.qat.epochs=1"], "'qat' is not among the --steps"),
        (["compression.prune.ratio"], "expected key=value,value"),
    ],
)
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_space({"prune": StructuredPruning}, max_steps=1, settings=settings)


def made_up(recipe, values):
    """A job whose figures are known: every step makes it smaller and less right."""
    ratio = float(values.get("compression.prune.ratio", 0))
    score = 0.9 - 0.01 * len(recipe) - 0.2 * ratio
    size = 100.0 * (1 - ratio) * (0.25 if "ptq" in recipe else 1)
    return Outcome(goals=(score, size), is_unsafe=score < 0.8, run=f"{recipe}{values}")


def make_search(tmp_path, num_trials, name="s"):
    settings = ["compression.prune.ratio=.3,.5,.7"]
    space = build_space(STEPS, max_steps=2, settings=settings)
    return Search(
        space=space, directions=("maximize", "minimize"), num_trials=num_trials,
        journal=tmp_path / "s.journal", name=name,
    )  # fmt: skip


def test_a_small_space_is_gone_through_once_and_its_frontier_found(tmp_path):
    search = make_search(tmp_path, 100)
    seen = []

    def evaluate(recipe, values):
        seen.append((recipe, tuple(values.items())))
        return made_up(recipe, values)

    study = search.run(evaluate)
    assert len(seen) == len(set(seen)) == search.space.size
    best = {tuple(trial.values) for trial in study.best_trials}
    everything = [made_up(recipe, dict(values)).goals for recipe, values in seen]
    frontier = {
        (score, size)
        for score, size in everything
        if not any(s >= score and z <= size and (s, z) != (score, size) for s, z in everything)
    }
    assert best == frontier


class StoppedError(Exception):
    pass


def test_a_search_that_was_stopped_goes_on(tmp_path):
    seen = []

    def evaluate(recipe, values):
        if len(seen) == 4 and stops.pop():
            raise StoppedError
        seen.append((recipe, tuple(values.items())))
        return made_up(recipe, values)

    stops = [False, True]
    with pytest.raises(StoppedError):
        make_search(tmp_path, 100).run(evaluate)
    study = make_search(tmp_path, 100).run(evaluate)
    assert len(seen) == len(set(seen)) == make_search(tmp_path, 100).space.size
    assert make_search(tmp_path, 100).run(evaluate).trials == study.trials, "nothing is left to do"


def test_a_second_process_at_a_search_is_refused(tmp_path):
    def evaluate(recipe, values):
        with pytest.raises(RecordError, match="another process is at the search of"):
            make_search(tmp_path, 2).run(made_up)
        return made_up(recipe, values)

    study = make_search(tmp_path, 2).run(evaluate)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2


def test_a_stopped_job_is_done_again_by_the_next_call_and_a_failed_one_is_not(tmp_path):
    space = build_space({"prune": StructuredPruning, "ptq": PostTrainingQuantization}, max_steps=1)
    search = Search(space=space, directions=("maximize", "minimize"), num_trials=2,
                    journal=tmp_path / "s.journal", name="s")  # fmt: skip
    calls = []

    def evaluate(recipe, values):
        calls.append(recipe)
        if len(calls) <= 2:
            kind = JobStopped if recipe == ("ptq",) else MedliteError
            raise kind(recipe)
        return made_up(recipe, values)

    search.run(evaluate)
    assert sorted(calls) == [("prune",), ("ptq",)]
    search.run(evaluate)
    assert calls[2:] == [("ptq",)]
    search.run(evaluate)
    assert len(calls) == 3


@pytest.fixture
def one_job(tmp_path, monkeypatch):
    """Search one recipe whose job ends with this code; the trials and the jobs that were run."""
    jobs = []

    def search(code):
        def fake_job(words, check):
            jobs.append(words)
            return SimpleNamespace(returncode=code)

        def remember(self, evaluate):
            studies.append(run(self, evaluate))
            return studies[-1]

        studies, run = [], Search.run
        monkeypatch.setattr(command.subprocess, "run", fake_job)
        monkeypatch.setattr(Search, "run", remember)
        monkeypatch.setattr(command.compare, "main", lambda argv: 0)
        outcome = Outcome(goals=(0.9, 1.0, 2.0), is_unsafe=False, run="run")
        monkeypatch.setattr(command, "outcome_of", lambda *about: outcome)
        main(["--steps", "ptq", "--trials", "1", "--outputs", str(tmp_path), "safety.enforce=true"])
        monkeypatch.setattr(Search, "run", run)
        return studies[0].trials, len(jobs)

    return search


def test_a_job_that_ends_unsafe_is_infeasible_and_no_failure(one_job):
    ((trial,), num_jobs) = one_job(3)
    assert (trial.state.name, trial.user_attrs["violation"]) == ("COMPLETE", 1.0)
    assert one_job(3)[1] == num_jobs == 1


@pytest.mark.parametrize(("code", "num_jobs"), [(0, 1), (1, 1), (-9, 2)])
def test_only_a_job_that_a_signal_ended_is_repeated(one_job, code, num_jobs):
    one_job(code)
    assert one_job(0)[1] == num_jobs


def test_larger_spaces_are_sampled_and_a_failed_job_is_not_tried_for_ever(tmp_path):
    calls = []

    def evaluate(recipe, values):
        calls.append(recipe)
        if "prune" in recipe:
            message = "no memory"
            raise MedliteError(message)
        return made_up(recipe, values)

    study = make_search(tmp_path, 12).run(evaluate)
    assert len(calls) == 12
    failed = [t for t in study.trials if "failure" in t.user_attrs]
    assert all("prune" in t.params["recipe"] for t in failed)
    assert failed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--goals", "p50"], "--goals p50: no such goal, did you mean 'p50_ms'"),
        (["--steps", "prun"], "--steps prun: no such step, did you mean 'prune'"),
        (["compression=qat"], "compression=qat: the search sets it itself"),
        (["--trials", "0"], "--trials 0: is below 1"),
    ],
)
def test_wrong_words_are_told_before_any_job(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        main([*words, "--outputs", str(tmp_path)])
