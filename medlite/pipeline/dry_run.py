"""What the compression steps will do, found out on fresh weights before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from medlite.errors import ConfigError
from medlite.pipeline.job import Job
from medlite.pipeline.teachers import Finished, as_one, find_teachers
from medlite.types import CompressionContext, CompressionStep, FitHooks

CALIBRATION_BATCHES = 1
"""enough to run through a step; on fresh weights more would say no more"""


class PlannedLine(NamedTuple):
    """One thing that a step says of itself."""

    step: str
    topic: str
    text: str


def plan_steps(job: Job) -> list[PlannedLine]:
    """Every step in order, on what the steps before it leave, without training.

    Which channels or layers a step chooses by their weights may differ later; what it changes,
    how much, and what it leaves alone does not.

    Raises:
        MedliteError: a step cannot do what it is asked for, as it would say after the training.
    """
    lines: list[PlannedLine] = []
    net = job.build_net(job.config.model).eval()
    _check_formats(job)
    for name, step in job.steps.items():
        torch.manual_seed(job.config.seed)
        found: list[tuple[str, str]] = []
        net, _ = step.apply(net, _dry_context(job, step, found))
        lines += [PlannedLine(name, topic, text) for topic, text in found]
    return lines


def _check_formats(job: Job) -> None:
    """Refuse runtimes whose format cannot hold what a step leaves."""
    problems = [
        f"runtime={runtime_name}, compression={name}: {refused[runtime.format]}"
        for name, step in job.steps.items()
        for runtime_name, runtime in job.runtimes.items()
        if runtime.format in (refused := getattr(step, "refused_formats", {}))
    ]
    if problems:
        raise ConfigError(problems)


def as_markdown(lines: list[PlannedLine]) -> str:
    """A table for the run directory."""
    rows = (f"| {line.step} | {line.topic} | {line.text} |" for line in lines)
    return "\n".join(["| step | topic | on fresh weights |", "|---|---|---|", *rows]) + "\n"


def as_text(lines: list[PlannedLine]) -> Iterator[str]:
    """Lines for the console."""
    return (f"{line.step}: {line.topic}: {line.text}" for line in lines)


def _dry_context(
    job: Job, step: CompressionStep, found: list[tuple[str, str]]
) -> CompressionContext:
    def keep(
        net: nn.Module,
        *,
        name: str,
        epochs: int,
        learning_rate: float,
        hooks: FitHooks | None = None,
    ) -> nn.Module:
        return net.eval()

    def build_teacher() -> nn.Module:
        nets = [
            each.build() if isinstance(each, Finished) else job.build_net(each.model)
            for each in find_teachers(job, step)
        ]
        return as_one(job, nets)

    return CompressionContext(
        spec=job.spec,
        fit=keep,
        calibration_images=job.data.calibration_images,
        calibration_batches=lambda n: job.data.calibration_batches(min(n, CALIBRATION_BATCHES)),
        validation_batches=lambda n: job.data.validation_batches(min(n, CALIBRATION_BATCHES)),
        build_teacher=build_teacher,
        report=lambda topic, text: found.append((topic, text)),
        is_dry=True,
    )
