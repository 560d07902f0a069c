"""What a run will do and how long that will take here, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from medlite.compression.selective_precision import SelectivePrecision
from medlite.config import STAGES
from medlite.pipeline.explaining import NUM_REDRAWN
from medlite.pipeline.job import Job
from medlite.pipeline.step_gains import NUM_QUERIES
from medlite.pipeline.teachers import Finished, find_teachers
from medlite.pipeline.training import baseline_entry, control_steps, num_latencies
from medlite.safety.robustness import conditions_of
from medlite.safety.saliency import STEPS, WINDOWS, methods_of
from medlite.safety.shortcuts import probes_of
from medlite.tasks.fit import plan_once
from medlite.tasks.plan import FitPlan, plan_fit
from medlite.tasks.supervised import SupervisedTask
from medlite.types import CompressionStep, TrainingStep

_SLOWDOWN = {"structure": 1.0, "train": 1.6, "numeric": 2.5}
"""a fine-tuning step beside a plain one: a teacher's forward pass, fake quantisation"""

_CONVERSION_SECONDS = 20.0
"""tracing, preparing and converting a graph, or exporting it"""

_TRACING_SECONDS = 3.0
"""tracing a graph alone, to explain it"""

_CORRUPTION_SECONDS = 0.005
"""corrupting one image, and scoring what was said about it"""

_GRADIENT_PASSES = 4
"""a forward and a backward pass of a single image, as passes of an image in a batch"""

_JUDGING_SECONDS = 15.0
"""resampling, and drawing the page"""

_PROCESS_SECONDS = 4.0
"""starting one measuring process and loading a model in it"""


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One line of the announcement."""

    stage: str
    what: str
    seconds: float


def plan_job(job: Job) -> list[PlannedStage]:
    """Every stage with an estimate; training times come from a timing of a few steps."""
    plan, baseline = _plan_baseline(job, job.config.model, job.config.choices["model"])
    planned, stages = [baseline], job.config.stages or STAGES
    if "compress" in stages:
        for name, step in job.steps.items():
            planned += _plan_step(job, plan, name, step)
        for control in control_steps(job):
            planned += _plan_step(job, plan, "control", control)
    if "export" in stages:
        planned.append(_plan_export(job))
    if "bench" in stages:
        planned.append(_plan_bench(job, plan))
        planned += _plan_gains(job, plan)
        planned += _plan_robustness(job, plan)
        planned += _plan_shortcuts(job, plan)
        planned += _plan_explanations(job, plan)
    if "report" in stages:
        planned.append(_plan_report(job, plan))
    return planned


def as_table(job: Job, planned: list[PlannedStage]) -> Table:
    """For the console."""
    spec, config = job.spec, job.config
    total = sum(stage.seconds for stage in planned)
    table = Table(title=f"{config.name}: about {_duration(total)}", title_justify="left")
    for heading in ("stage", "what", "about"):
        table.add_column(heading, justify="right" if heading == "about" else "left")
    counts = " / ".join(str(spec.num_samples[split]) for split in ("train", "val", "test"))
    groups = sum(spec.num_groups.values())
    table.add_row("data", f"{spec.name}: {counts} images of {groups} {spec.group_kind}s", "")
    if spec.provenance != "real":
        table.add_row("", spec.provenance, "")
    for stage in planned:
        table.add_row(stage.stage, stage.what, _duration(stage.seconds))
    return table


def _plan_baseline(job: Job, model: dict, label: str) -> tuple[FitPlan, PlannedStage]:
    entry = baseline_entry(job, model, label)
    if entry.is_done:
        plan = FitPlan(**entry.record()["plan"])
        return plan, PlannedStage(stage="train", what=f"{label}: from the store", seconds=0.0)
    settings = job.config.train
    task = SupervisedTask(job.build_net(model), spec=job.spec, settings=settings)
    with entry.lock():
        plan = plan_once(task, job.data, entry.fit_directory / "plan.json")
    what = f"{label}: {_epochs(plan)}"
    return plan, PlannedStage(stage="train", what=what, seconds=plan.estimated_seconds)


def _plan_step(job: Job, baseline: FitPlan, name: str, step: CompressionStep) -> list[PlannedStage]:
    planned = []
    for teacher in find_teachers(job, step):
        if isinstance(teacher, Finished):
            what = f"{teacher.name}: finished"
            planned.append(PlannedStage(stage="teach", what=what, seconds=0.0))
        else:
            _, stage = _plan_baseline(job, teacher.model, teacher.name)
            planned.append(PlannedStage(stage="teach", what=stage.what, seconds=stage.seconds))
    if not isinstance(step, TrainingStep):
        return [*planned, _plan_calibration(job, baseline, name, step)]
    slowdown = _SLOWDOWN[getattr(step, "stage", "train")]
    plan = plan_fit(
        epochs=step.epochs,
        num_batches=len(job.data.train_dataloader()),
        num_val_batches=len(job.data.val_dataloader()),
        seconds=(slowdown * baseline.seconds_per_step, slowdown * baseline.seconds_per_val_batch),
        budget_minutes=job.config.train.budget_minutes,
    )
    timed_seconds = num_latencies(step) * (_CONVERSION_SECONDS + 2 * _PROCESS_SECONDS)
    seconds = plan.estimated_seconds + _CONVERSION_SECONDS + timed_seconds
    return [*planned, PlannedStage(stage=name, what=_epochs(plan), seconds=seconds)]


def _plan_calibration(
    job: Job, baseline: FitPlan, name: str, step: CompressionStep
) -> PlannedStage:
    what, seconds = "calibration only", _CONVERSION_SECONDS
    if isinstance(step, SelectivePrecision):
        trials = step.num_trials(job.build_net(job.config.model))
        batches = min(step.validation_batches, len(job.data.val_dataloader()))
        what = f"calibration, up to {trials} trials on {batches} validation batches"
        seconds += trials * batches * _SLOWDOWN["numeric"] * baseline.seconds_per_val_batch
    return PlannedStage(stage=name, what=what, seconds=seconds)


def _plan_export(job: Job) -> PlannedStage:
    formats = sorted({runtime.format for runtime in job.runtimes.values()})
    seconds = _CONVERSION_SECONDS * _num_models(job)
    return PlannedStage(stage="export", what=", ".join(formats), seconds=seconds)


def _plan_bench(job: Job, plan: FitPlan) -> PlannedStage:
    settings = job.config.benchmark
    num_test = job.spec.num_samples["test"]
    seconds_per_image = plan.seconds_per_val_batch / job.config.train.batch_size
    images = settings.num_warmup + settings.num_queries + num_test
    per_candidate = images * seconds_per_image + settings.throughput_seconds + _PROCESS_SECONDS
    candidates = _num_models(job) * len(job.runtimes)
    what = f"{settings.num_queries} queries of each of {candidates} candidates in turns"
    return PlannedStage(stage="bench", what=what, seconds=candidates * per_candidate)


def _plan_gains(job: Job, plan: FitPlan) -> list[PlannedStage]:
    steps = len(job.steps)
    if steps < 2 or not job.config.benchmark.each_step:
        return []
    settings, forward = job.config.benchmark, plan.seconds_per_val_batch
    images = settings.num_warmup + min(settings.num_queries, NUM_QUERIES)
    per_candidate = images * forward / job.config.train.batch_size + _PROCESS_SECONDS
    seconds = (steps - 1) * _CONVERSION_SECONDS + 2 * steps * len(job.runtimes) * per_candidate
    what = f"each of {steps} steps beside what came into it"
    return [PlannedStage(stage="gains", what=what, seconds=seconds)]


def _plan_robustness(job: Job, plan: FitPlan) -> list[PlannedStage]:
    settings = job.config.robustness
    if not settings.enabled:
        return []
    images = min(settings.num_images, job.spec.num_samples["test"])
    conditions = len(conditions_of(settings, job.spec.modality))
    candidates = _num_models(job) * len(job.runtimes)
    forward = candidates * plan.seconds_per_val_batch / job.config.train.batch_size
    seconds = images * conditions * (forward + _CORRUPTION_SECONDS)
    what = f"{images} images under {conditions} corruptions"
    return [PlannedStage(stage="robustness", what=what, seconds=seconds)]


def _plan_shortcuts(job: Job, plan: FitPlan) -> list[PlannedStage]:
    if not job.config.shortcuts.enabled:
        return []
    images = min(job.config.shortcuts.num_images, job.spec.num_samples["test"])
    has_regions = job.data.data.test.regions is not None
    probes = probes_of(job.spec, has_regions=has_regions)
    candidates = _num_models(job) * len(job.runtimes)
    forward = candidates * plan.seconds_per_val_batch / job.config.train.batch_size
    seconds = images * len(probes) * forward
    what = f"{images} images, {', '.join(probes).replace('_', ' ')}"
    return [PlannedStage(stage="shortcuts", what=what, seconds=seconds)]


def _plan_explanations(job: Job, plan: FitPlan) -> list[PlannedStage]:
    settings = job.config.explainability
    if not settings.enabled:
        return []
    images = min(settings.num_images, job.spec.num_samples["test"])
    windows = WINDOWS[job.spec.num_spatial_dims] ** job.spec.num_spatial_dims
    methods, models = methods_of(settings), _num_models(job)
    checked = 2 * min(NUM_REDRAWN, images)
    occluded = images * models * len(job.runtimes) + checked
    inside = images * models + checked
    passes = occluded * windows * ("occlusion" in methods)
    passes += inside * _GRADIENT_PASSES * STEPS * ("integrated_gradients" in methods)
    forward = plan.seconds_per_val_batch / job.config.train.batch_size
    what = f"{images} images, {', '.join(methods).replace('_', ' ')}"
    seconds = passes * forward + models * _TRACING_SECONDS
    return [PlannedStage(stage="explainability", what=what, seconds=seconds)]


def _plan_report(job: Job, plan: FitPlan) -> PlannedStage:
    nets = 1 + len(job.steps) + len(control_steps(job))
    images = job.spec.num_samples["val"] + job.spec.num_samples["test"]
    forward = plan.seconds_per_val_batch / job.config.train.batch_size
    what = f"{images} images through {nets} net{'s' * (nets != 1)} of torch, statistics"
    return PlannedStage(
        stage="report", what=what, seconds=nets * images * forward + _JUDGING_SECONDS
    )


def _num_models(job: Job) -> int:
    return 2 if job.steps else 1


def _epochs(plan: FitPlan) -> str:
    epochs, batches = plan.epochs, plan.batches_per_epoch
    return f"{epochs} epoch{'s' * (epochs != 1)} of {batches} batch{'es' * (batches != 1)}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
