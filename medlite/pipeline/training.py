"""Stages `train` and `compress`: from the store, or made and put there."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from medlite.compression.fine_tuning import FineTuning
from medlite.metrics.task import primary_metric
from medlite.pipeline.job import Job
from medlite.pipeline.step_latency import StepLatency
from medlite.pipeline.teachers import Finished, ToTrain, as_one, find_teachers
from medlite.store import Entry
from medlite.tasks.fit import FitResult, fit, shortened
from medlite.tasks.plan import FitPlan
from medlite.types import (
    CompressionContext,
    CompressionStep,
    FitHooks,
    TrainingStep,
    TrainSettings,
)

_log = logging.getLogger(__name__)

History = Mapping[str, list[dict[str, float]]]
"""fit -> its curves, in the order of the fits"""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A net (evaluation mode), the store's key of it, and how it came to be.

    history: curves of each fit. notes: (topic, text) pairs for the card. seconds: of each part.
    name: of a teacher. answers: of a teacher, whether its logits are of the job's own classes.
    teacher: of whom the step that left the net has learned, if that one answers.
    """

    net: nn.Module
    key: str
    history: History = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[tuple[str, str], ...] = ()
    name: str = ""
    answers: bool = True
    teacher: Trained | None = None


def baseline_entry(job: Job, model: Mapping[str, Any], label: str) -> Entry:
    """Where the trained baseline is, or will be."""
    dataset = job.config.choices["dataset"]
    return job.store.entry(f"{dataset}-{label}", job.made_of(model))


def train_baseline(job: Job) -> Trained:
    """The uncompressed net of the job."""
    return _trained(job, job.config.model, job.config.choices["model"], "baseline")


def compress(job: Job, baseline: Trained) -> dict[str, Trained]:
    """What each step of the job leaves, in order, each through the store."""
    after: dict[str, Trained] = {}
    current = baseline
    for name, step in job.steps.items():
        parent = current
        current = _compressed(job, parent, name, step)
        loss = unrecovered(job, name, parent.history, current.history)
        if loss:
            _log.warning("%s: %s", name, loss)
            current = replace(current, notes=(*current.notes, (name, loss)))
        after[name] = current
    return after


def unrecovered(job: Job, name: str, before: History, after: History) -> str:
    """What a step's training left lost of the validation score, if more than the gate allows."""
    trained = [rows for fit_name, rows in after.items() if fit_name not in before]
    if not trained:
        return ""
    metric = f"val/{primary_metric(job.spec)}"
    was, became = (
        max((row[metric] for row in rows if math.isfinite(row[metric])), default=math.nan)
        for rows in (list(before.values())[-1], trained[-1])
    )
    is_lost = math.isfinite(was) and not math.isfinite(became)
    if not is_lost and not was - became > job.config.safety.metric_drop:
        return ""
    num_epochs, budget = sum(map(len, trained)), job.config.train.budget_minutes
    more = f"more of them (compression.{name}.epochs)"
    if budget is not None and num_epochs < job.config.compression[name]["epochs"]:
        more = f"a larger train.budget_minutes ({budget:g})"
    return (
        f"{metric} was {was:.3f} before and is {became:.3f} after {num_epochs} epochs; "
        f"{more}, or another learning_rate, may win it back"
    )


def train_control(job: Job, baseline: Trained) -> Trained | None:
    """The uncompressed net after the further training that the steps had, in float.

    None if they train nothing, or if fine-tuning is all they do.
    """
    current = baseline
    for step in control_steps(job):
        current = _compressed(job, current, "finetune", step)
    return None if current is baseline else current


def control_steps(job: Job) -> list[FineTuning]:
    """For each step that trains, as many epochs with its learning rate."""
    steps = job.steps.values()
    if not job.config.control or all(isinstance(step, FineTuning) for step in steps):
        return []
    return [
        FineTuning(epochs=step.epochs, learning_rate=step.learning_rate)
        for step in steps
        if isinstance(step, TrainingStep)
    ]


def _trained(job: Job, model: Mapping[str, Any], label: str, fit_name: str) -> Trained:
    entry = baseline_entry(job, model, label)
    with entry.lock():
        if entry.is_done:
            _replay(job, fit_name, next(iter(entry.record()["history"].values())))
        else:
            result = fit(
                job.build_net(model),
                spec=job.spec,
                data=job.data,
                settings=job.config.train,
                directory=entry.fit_directory,
                seed=job.config.seed,
                loggers=job.loggers(fit_name),
                announce=partial(_announce, f"{fit_name} ({label})"),
            )
            entry.save(
                result.net.state_dict(),
                None,
                {
                    "history": {fit_name: result.history},
                    "seconds": result.seconds,
                    "plan": asdict(result.plan),
                },
            )
        weights, _ = entry.load()
    net = job.build_net(model)
    net.load_state_dict(weights)
    record = entry.record()
    return Trained(
        net=net.eval(),
        key=entry.key,
        history={fit_name: next(iter(record["history"].values()))},
        seconds={fit_name: record["seconds"]},
    )


def _compressed(job: Job, parent: Trained, name: str, step: CompressionStep) -> Trained:
    # A control may be a step of another job, or of this one, and is then made once.
    made_of = asdict(step) if isinstance(step, FineTuning) else job.config.compression[name]
    made: dict[str, Any] = {"parent": parent.key, "step": made_of, "seed": job.config.seed}
    teacher = _teacher(job, step)
    if teacher is not None:
        made["teacher"] = teacher.key
    if num_latencies(step):
        made["timed_on"] = [_first(job.config.runtime), asdict(job.config.hardware)]
    entry = job.store.entry(f"{parent.key.rpartition('-')[0]}+{name}", made)
    with entry.lock():
        if entry.is_done:
            weights, state = entry.load()
            for fit_name, rows in entry.record()["history"].items():
                _replay(job, fit_name, rows)
            net = step.restore(copy.deepcopy(parent.net), state, job.spec)
            net.load_state_dict(weights)
        else:
            net = _apply(job, parent, name, step, entry, teacher=teacher)
    record = entry.record()
    return Trained(
        net=net,
        key=entry.key,
        history={**parent.history, **record["history"]},
        seconds={**parent.seconds, name: record["seconds"]},
        notes=(*parent.notes, *((topic, text) for topic, text in record["notes"])),
        teacher=teacher if teacher is not None and teacher.answers else None,
    )


def _apply(
    job: Job,
    parent: Trained,
    name: str,
    step: CompressionStep,
    entry: Entry,
    *,
    teacher: Trained | None,
) -> nn.Module:
    start = time.perf_counter()
    history: dict[str, list[dict[str, float]]] = {}
    notes: list[tuple[str, str]] = []

    def run_fit(
        net: nn.Module,
        *,
        name: str,
        epochs: int,
        learning_rate: float,
        hooks: FitHooks | None = None,
    ) -> nn.Module:
        settings = shortened(
            _share_of_budget(job.config.train, step, epochs),
            epochs=epochs,
            learning_rate=learning_rate,
        )
        result: FitResult = fit(
            net,
            spec=job.spec,
            data=job.data,
            settings=settings,
            directory=entry.fit_directory / name,
            seed=job.config.seed,
            hooks=hooks,
            loggers=job.loggers(name),
            announce=partial(_announce, name),
        )
        history[name] = result.history
        return result.net

    def build_teacher() -> nn.Module:
        assert teacher is not None
        return teacher.net.requires_grad_(requires_grad=False)

    context = CompressionContext(
        spec=job.spec,
        fit=run_fit,
        calibration_images=job.data.calibration_images,
        calibration_batches=job.data.calibration_batches,
        validation_batches=job.data.validation_batches,
        build_teacher=build_teacher,
        report=lambda topic, text: notes.append((topic, text)),
        latency_ms=_latency_meter(job, parent, entry) if num_latencies(step) else None,
    )
    torch.manual_seed(job.config.seed)
    _log.info("%s: compressing", name)
    net, state = step.apply(copy.deepcopy(parent.net), context)
    seconds = time.perf_counter() - start
    record = {"history": history, "seconds": seconds, "notes": notes}
    entry.save(net.state_dict(), state, record)
    return net


def num_latencies(step: CompressionStep) -> int:
    """How many nets a step times at most: 0 for most steps."""
    return getattr(step, "num_latencies", 0)


def _teacher(job: Job, step: CompressionStep) -> Trained | None:
    """The teachers of a step as one; what is not finished is trained through the store."""
    found = find_teachers(job, step)
    if not found:
        return None
    nets = [_taught(job, each) for each in found]
    return Trained(
        net=as_one(job, [each.net for each in nets]).eval(),
        key="+".join(each.key for each in nets),
        name=" and ".join(each.name for each in found),
        answers=all(each.answers for each in found if isinstance(each, Finished)),
    )


def _taught(job: Job, teacher: ToTrain | Finished) -> Trained:
    if isinstance(teacher, Finished):
        return Trained(net=teacher.build(), key=teacher.key)
    return _trained(job, teacher.model, teacher.name, f"teacher_{teacher.name}")


def _latency_meter(job: Job, parent: Trained, entry: Entry) -> StepLatency:
    return StepLatency(
        runtime=_first(job.runtimes),
        hardware=job.config.hardware,
        settings=job.config.benchmark,
        image=job.data.calibration_images(1).numpy(),
        reference=parent.net,
        directory=entry.fit_directory / "latency",
    )


def _share_of_budget(settings: TrainSettings, step: CompressionStep, epochs: int) -> TrainSettings:
    """Settings whose time is shared out among the fits of a step as its epochs are."""
    if settings.budget_minutes is None or not isinstance(step, TrainingStep):
        return settings
    return replace(settings, budget_minutes=settings.budget_minutes * epochs / step.epochs)


def _first(named: Mapping[str, Any]) -> Any:
    return next(iter(named.values()))


def _replay(job: Job, fit_name: str, rows: list[dict[str, float]]) -> None:
    """Log the curves of a fit that another job made: every run shows how its weights came."""
    for logger in job.loggers(fit_name):
        for row in rows:
            logger.log_metrics(row, step=int(row["epoch"]))
        logger.save()


def _announce(name: str, plan: FitPlan) -> None:
    _log.info(
        "%s: %d epochs of %d batches, about %.1f min",
        name,
        plan.epochs,
        plan.batches_per_epoch,
        plan.estimated_seconds / 60,
    )
