"""One job from configuration to verdict."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medlite import __version__
from medlite.bench.affinity import affinity_problem
from medlite.bench.benchmark import settings_problems
from medlite.compression.order import check_order
from medlite.config import JobConfig, build, digest, locate
from medlite.data.image_data import ImageData
from medlite.data.module import ImageDataModule
from medlite.errors import ConfigError
from medlite.pipeline.dry_run import as_markdown, as_text, plan_steps
from medlite.pipeline.explaining import explain
from medlite.pipeline.job import Job, build_runtimes, check_task, remedies_for
from medlite.pipeline.loggers import Sinks, open_sinks
from medlite.pipeline.measuring import export_models, measure
from medlite.pipeline.plan import as_table, plan_job
from medlite.pipeline.recording import Evidence, publish, record
from medlite.pipeline.robustness import measure_robustness
from medlite.pipeline.shortcuts import measure_shortcuts
from medlite.pipeline.step_gains import measure_steps
from medlite.pipeline.teachers import file_marks
from medlite.pipeline.training import compress, train_baseline, train_control
from medlite.report.terminal import console
from medlite.safety.plan import check_margins
from medlite.safety.robustness import check_settings
from medlite.safety.saliency import check_explainability
from medlite.store import exclusive

_log = logging.getLogger(__name__)


def run(config: JobConfig) -> Path:
    """Train, compress, export, benchmark, judge, report and log; returns the run directory.

    Every stage leaves its output under a key of what made it and is skipped while that output is
    there, so the same command goes on where an earlier one stopped.

    Raises:
        MedliteError: anything that the user can mend.
    """
    with exclusive(config.directory):
        _check_before_anything(config)
        images: ImageData = build(config.dataset)
        check_task(config, images.spec)
        key = digest([__version__, config.key, images.fingerprint, *file_marks(config)])
        if _is_done(config.directory, key):
            _log.info("%s is done: delete it to run again", config.directory)
            return config.directory
        _write_splits(config.directory, images)
        with open_sinks(config) as sinks, remedies_for(config, images):
            data = ImageDataModule(
                images,
                batch_size=config.train.batch_size,
                num_workers=config.train.num_workers,
                augment=config.train.augment,
                seed=config.seed,
            )
            is_whole = _run_stages(Job(config=config, data=data, loggers=sinks.loggers), sinks)
        if is_whole:
            (config.directory / "done").write_text(key)
    return config.directory


def _check_before_anything(config: JobConfig) -> None:
    """What the rooms themselves know of impossible settings.

    Raises:
        ConfigError: with every problem.
    """
    steps = {name: locate(node["_target_"]) for name, node in config.compression.items()}
    problems = [*check_order(steps), *settings_problems(config.benchmark)]
    if "bench" in config.stages:
        problems += _hardware_problems(config)
    if problems:
        raise ConfigError(problems)
    check_margins(config.safety)
    check_settings(config.robustness)
    check_explainability(config.explainability)


def _hardware_problems(config: JobConfig) -> list[str]:
    """Why this machine cannot measure as the hardware profile says."""
    runtimes = build_runtimes(config.runtime)
    refusals = {name: each.refuses(config.hardware) for name, each in runtimes.items()}
    problems = [f"runtime={name}: {reason}" for name, reason in refusals.items() if reason]
    affinity = affinity_problem(config.hardware.cpu_affinity)
    return [affinity, *problems] if affinity else problems


def _run_stages(job: Job, sinks: Sinks) -> bool:
    """Run the stages that were asked for; True when the last of them was the report."""
    stages, seconds = job.config.stages, dict[str, float]()
    if "compress" in stages or not stages:
        _plan_steps(job)
    console().print(as_table(job, plan_job(job)))
    if "train" not in stages:
        return False
    with _timed(seconds, "train"):
        baseline = train_baseline(job)
    if "compress" not in stages:
        return False
    with _timed(seconds, "compress"):
        steps = compress(job, baseline)
        control = train_control(job, baseline)
    if "export" not in stages:
        return False
    deployed = [baseline, *steps.values()][-1]
    nets = {"": deployed.net}
    if job.steps:
        nets["baseline"] = baseline.net
    with _timed(seconds, "export"):
        artifacts = export_models(job, nets, deployed.key)
    if "bench" not in stages:
        return False
    with _timed(seconds, "bench"):
        bench = measure(job, nets, artifacts, deployed.key)
        gains = measure_steps(job, steps, artifacts, bench.measurements)
    with _timed(seconds, "robustness"):
        robustness = measure_robustness(job, artifacts, bench, deployed.key)
    with _timed(seconds, "shortcuts"):
        shortcuts = measure_shortcuts(job, artifacts, bench, deployed.key)
    with _timed(seconds, "explainability"):
        explanations = explain(job, nets, artifacts, bench, deployed.key)
    if "report" not in stages:
        return False
    evidence = Evidence(
        deployed=deployed,
        baseline=baseline,
        steps=steps,
        control=control,
        artifacts=artifacts,
        bench=bench,
        gains=gains,
        robustness=robustness,
        shortcuts=shortcuts,
        explanations=explanations,
        seconds=seconds,
    )
    publish(job, record(job, evidence), sinks)
    return True


def _plan_steps(job: Job) -> None:
    """What the steps would do, in plan.md; found out once, before anything is trained."""
    path, mark = job.config.directory / "plan.md", f"<!-- {job.config.key} -->\n"
    if path.exists() and path.read_text().endswith(mark) and job.config.stages:
        return
    lines = plan_steps(job)
    path.write_text(f"{as_markdown(lines)}\n{mark}")
    for line in as_text(lines):
        console().print(line, markup=False)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _is_done(directory: Path, key: str) -> bool:
    path = directory / "done"
    return path.exists() and path.read_text() == key


def _write_splits(directory: Path, images: ImageData) -> None:
    """Which patients are in which split; stays on this machine."""
    path = directory / "splits.json"
    path.write_text(json.dumps(images.split_assignment(), indent=1))
    if images.skipped:
        lines = "\n".join(str(bad) for bad in images.skipped)
        (directory / "skipped.txt").write_text(lines + "\n")
        _log.warning("%d bad files were skipped: see %s", len(images.skipped), directory)


def quieten_libraries() -> None:
    """Leave the console to the job: of the libraries below it, errors alone are shown."""
    for name in ("lightning.pytorch", "torch", "onnx_ir", "onnxscript", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", module="lightning")
