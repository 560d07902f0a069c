"""`medlite search`: jobs of many recipes, one after another, and the frontier that they reach."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from medlite.command_line import conf_directory, find_options, user_directories
from medlite.config import digest, locate, step_config
from medlite.errors import EXIT_UNSAFE, ConfigError, MedliteError, did_you_mean
from medlite.report import compare
from medlite.report.comparison import BETTER_HIGH, ComparisonRow, rows_of
from medlite.report.result import FILE_NAME, read_result
from medlite.report.terminal import console
from medlite.search.search import JobStopped, Outcome, Search
from medlite.search.space import Recipe, build_space, overrides_of

STEPS = ("distill", "prune", "low_rank", "ptq", "qat")
GOALS = ("metric", "p50_ms", "speedup", "size_kib", "peak_mib", "ece", "rare_sensitivity")


def main(argv: Sequence[str]) -> int:
    """Run the jobs that are missing, and show all of them side by side.

    Returns:
        0, or 1 if not one job came to an end.

    Raises:
        MedliteError: misspelt steps, goals or settings.
    """
    options, overrides = parse_arguments(argv)
    directories = [conf_directory(), *user_directories(overrides)]
    steps = {name: locate(step_config(name, directories)["_target_"]) for name in options.steps}
    space = build_space(steps, max_steps=options.max_steps, settings=options.settings)
    made_of = [sorted(overrides), space.recipes, space.settings, options.goals, options.runtime]
    name = f"search-{digest(made_of)[:6]}"
    folder = options.outputs / "searches"
    folder.mkdir(parents=True, exist_ok=True)
    console().print(f"{name}: {min(options.trials, space.size)} of {space.size} jobs")

    def evaluate(recipe: Recipe, values: Mapping[str, str]) -> Outcome:
        run = f"{name}-{'+'.join(recipe)}-{digest(values)[:6]}"
        words = [*overrides, *overrides_of(recipe, values)]
        words += [f"name={run}", f"outputs={options.outputs}"]
        code = _run_job(words)
        result = options.outputs / "runs" / run / FILE_NAME
        outcome = outcome_of(result, options.goals, options.runtime)
        return replace(outcome, is_unsafe=outcome.is_unsafe or code == EXIT_UNSAFE)

    study = Search(
        space=space,
        directions=["maximize" if goal in BETTER_HIGH else "minimize" for goal in options.goals],
        num_trials=options.trials,
        journal=folder / f"{name}.journal",
        name=name,
    ).run(evaluate)
    runs = [trial.user_attrs["run"] for trial in study.trials if "run" in trial.user_attrs]
    if not runs:
        return 1
    targets = ["--csv", str(folder / f"{name}.csv"), "--html", str(folder / f"{name}.html")]
    compare.main([*dict.fromkeys(runs), "--over-seeds", *targets])
    return 0


def _run_job(words: Sequence[str]) -> int:
    """Run one job to its end, which may be that it is unsafe; returns its exit code.

    Raises:
        JobStopped: a signal ended it, such as Ctrl-C or the system's when memory is short.
        MedliteError: it failed.
    """
    code = subprocess.run([sys.executable, "-m", "medlite", *words], check=False).returncode
    if code < 0:
        message = (
            f"the job was stopped by signal {-code}; the same command repeats it: "
            f"medlite {' '.join(words)}"
        )
        raise JobStopped(message)
    if code not in (0, EXIT_UNSAFE):
        message = f"the job ended with code {code}: medlite {' '.join(words)}"
        raise MedliteError(message)
    return code


def outcome_of(path: Path, goals: Sequence[str], runtime: str | None) -> Outcome:
    """What a record says of the goals, on one runtime (by default the first).

    Raises:
        MedliteError: the runtime is not in the record, or a goal was not measured.
    """
    rows = {row.runtime: row for row in rows_of(read_result(path))}
    row = next(iter(rows.values()), None) if runtime is None else rows.get(runtime)
    if row is None:
        message = f"--runtime {runtime}: {path} has {', '.join(rows) or 'no runtime'}"
        raise MedliteError(message)
    return Outcome(
        goals=tuple(_value(row, goal, path) for goal in goals),
        is_unsafe=row.safety == "FAIL",
        run=str(path.parent),
    )


def _value(row: ComparisonRow, goal: str, path: Path) -> float:
    value = getattr(row, goal)
    if value is None:
        message = f"{path}: {goal} was not measured on {row.runtime}"
        raise MedliteError(message)
    return float(value)


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the search, and the overrides of every job.

    Raises:
        ConfigError: misspelt steps or goals, or words that the search sets itself.
    """
    parser = argparse.ArgumentParser(
        prog="medlite search",
        description="Search recipes of compression steps; the same command goes on after a stop.",
        epilog="Other words are overrides of every job: model=unet dataset=phantom ...",
    )
    parser.add_argument("--steps", nargs="+", default=list(STEPS), help=f"default: {STEPS}")
    parser.add_argument("--max-steps", type=int, default=3, help="of a recipe")
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="KEY=VALUE,VALUE", help="what else to choose"
    )
    parser.add_argument("--trials", type=int, default=20, help="jobs in all")
    parser.add_argument(
        "--goals",
        nargs="+",
        default=["metric", "speedup", "size_kib"],
        help=f"of {', '.join(GOALS)}; the speed-up is over each job's own uncompressed net",
    )
    parser.add_argument("--runtime", help="whose figures count; default: the job's first")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    options, rest = parser.parse_known_args(argv)
    problems = [
        f"--goals {goal}: no such goal, {did_you_mean(goal, GOALS)}"
        for goal in options.goals
        if goal not in GOALS
    ]
    known = find_options([conf_directory(), *user_directories(rest)])["compression"]
    problems += [
        f"--steps {step}: no such step, {did_you_mean(step, known)}"
        for step in options.steps
        if step not in known or step == "none"
    ]
    owned = ("compression=", "name=", "outputs=", "-m", "--multirun")
    problems += [f"{word}: the search sets it itself" for word in rest if word.startswith(owned)]
    for key in ("max_steps", "trials"):
        if getattr(options, key) < 1:
            problems.append(f"--{key.replace('_', '-')} {getattr(options, key)}: is below 1")
    if problems:
        raise ConfigError(problems)
    return options, rest
