"""Trials of one search, kept on the disk so that it goes on where it was stopped.

Optuna (Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework",
arXiv:1907.10902) proposes; a recipe that fails the safety gate is infeasible, whatever it saves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlite.errors import MedliteError
from medlite.optional import require
from medlite.search.space import Recipe, Space
from medlite.store import held

_log = logging.getLogger(__name__)

SEPARATOR = " > "


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job came to: a number for each goal, and whether the gate failed it."""

    goals: tuple[float, ...]
    is_unsafe: bool
    run: str


class JobStopped(MedliteError):  # noqa: N818 - reads as what it is
    """A job that a signal ended: it says nothing of its recipe, and is done again."""


Evaluate = Callable[[Recipe, Mapping[str, str]], Outcome]
"""(recipe, settings) -> outcome; raises JobStopped where the job was stopped, another
MedliteError where it failed"""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search for the recipes that no other beats.

    Args:
        space: what may be chosen. Spaces that are no larger than `num_trials` are gone through
            one by one; of larger ones a tree-structured Parzen estimator chooses (Ozaki et al.,
            "Multiobjective Tree-Structured Parzen Estimator", JAIR 73).
        directions: "maximize" or "minimize", one for each goal.
        num_trials: jobs in all, those of earlier calls included.
        journal: the file that keeps the trials.
        name: of the search; another space or other goals need another one.
        seed: of the proposals.
    """

    space: Space
    directions: Sequence[str]
    num_trials: int
    journal: Path
    name: str
    seed: int = 0

    def run(self, evaluate: Evaluate) -> Any:
        """Do what is missing of the trials; returns the Optuna study.

        Jobs that were stopped are done again by the next call.

        Raises:
            MissingDependency: Optuna is not installed.
            RecordError: another process is at this search.
        """
        message = (
            f"another process is at the search of {self.journal}: wait for it, and start the same "
            "command again to see what it found, or give this search other steps or settings"
        )
        # Optuna itself locks ".journal.lock"; trials of a holder that died are left-overs
        with held(self.journal.with_suffix(".running"), message):
            return self._run(evaluate)

    def _run(self, evaluate: Evaluate) -> Any:
        study = self._study()
        _repeat_interrupted(study)

        def objective(trial: Any) -> tuple[float, ...]:
            recipe, values = self._propose(trial)
            try:
                outcome = evaluate(recipe, values)
            except MedliteError as error:
                _log.warning("%s: %s", SEPARATOR.join(recipe), error)
                if not isinstance(error, JobStopped):
                    trial.set_user_attr("failure", str(error))
                raise
            trial.set_user_attr("run", outcome.run)
            trial.set_user_attr("violation", 1.0 if outcome.is_unsafe else 0.0)
            return outcome.goals

        missing = self._num_jobs - len(_ended(study))
        if missing > 0:
            study.optimize(objective, n_trials=missing, catch=(MedliteError,))
        return study

    @property
    def _num_jobs(self) -> int:
        return min(self.num_trials, self.space.size)

    def _study(self) -> Any:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        backend = optuna.storages.journal.JournalFileBackend(str(self.journal))
        return optuna.create_study(
            study_name=self.name,
            directions=list(self.directions),
            storage=optuna.storages.JournalStorage(backend),
            sampler=self._sampler(optuna),
            load_if_exists=True,
        )

    def _sampler(self, optuna: Any) -> Any:
        if self.space.size <= self.num_trials:
            return optuna.samplers.BruteForceSampler(seed=self.seed)
        return optuna.samplers.TPESampler(
            seed=self.seed, constraints_func=lambda trial: (trial.user_attrs["violation"],)
        )

    def _propose(self, trial: Any) -> tuple[Recipe, dict[str, str]]:
        names = [SEPARATOR.join(recipe) for recipe in self.space.recipes]
        recipe = tuple(trial.suggest_categorical("recipe", names).split(SEPARATOR))
        values = {
            key: trial.suggest_categorical(key, list(self.space.settings[key]))
            for key in self.space.keys_of(recipe)
        }
        return recipe, values


def _repeat_interrupted(study: Any) -> None:
    """Trials that were running when the process was stopped are done again, first."""
    states = _states()
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
    waiting = study.get_trials(states=(states.WAITING,))
    known = [trial.params for trial in _ended(study)]
    known += [trial.system_attrs["fixed_params"] for trial in waiting]
    for trial in study.get_trials(states=(states.FAIL,)):
        if trial.params and trial.params not in known:
            study.enqueue_trial(trial.params)
            known.append(trial.params)


def _ended(study: Any) -> list[Any]:
    """Trials that came to something, if only to an error of the job's own."""
    trials = study.get_trials(deepcopy=False)
    states = _states()
    return [
        trial for trial in trials if trial.state == states.COMPLETE or "failure" in trial.user_attrs
    ]


def _optuna() -> Any:
    return require("optuna", extra="search", needed_by="medlite search")


def _states() -> Any:
    return _optuna().trial.TrialState
