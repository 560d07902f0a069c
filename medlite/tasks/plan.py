"""How long a fit will take here, from a timing of a few steps, and what fits a budget."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from medlite.tasks.checkpoints import save_text
from medlite.tasks.supervised import SupervisedTask
from medlite.types import Batch

_SHORTEST_EPOCHS = 4
"""a budget below one epoch is still cut into this many, each with a checkpoint and a validation"""


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """What a fit will do. Written once a fit, so that a resumed fit follows the same plan."""

    epochs: int
    batches_per_epoch: int
    val_batches: int
    seconds_per_step: float
    seconds_per_val_batch: float

    @property
    def total_steps(self) -> int:
        """Optimiser steps in all."""
        return self.epochs * self.batches_per_epoch

    @property
    def estimated_seconds(self) -> float:
        """Time of all epochs, validation included."""
        training = self.batches_per_epoch * self.seconds_per_step
        return self.epochs * (training + self.val_batches * self.seconds_per_val_batch)

    def write(self, path: Path) -> None:
        """Save as JSON, whole or not at all."""
        save_text(json.dumps(asdict(self)), path)

    @classmethod
    def read(cls, path: Path) -> FitPlan:
        """The inverse of `write`."""
        return cls(**json.loads(path.read_text()))


def time_steps(
    task: SupervisedTask, batches: Iterable[Batch], *, num_steps: int = 3
) -> tuple[float, float]:
    """Median seconds of a training step, loading included, and of a validation batch.

    The task is left as it was.
    """
    kept = copy.deepcopy(task.state_dict())
    device = torch.device("cuda") if _uses_cuda(task) else torch.device("cpu")
    task.to(device)
    training, validation = [], []
    start = time.perf_counter()
    for batch in islice(batches, num_steps + 1):
        loading = time.perf_counter() - start
        moved = Batch(*(tensor.to(device) for tensor in batch))
        training.append(loading + _seconds_of_step(task, moved))
        validation.append(_seconds_of_forward(task, moved))
        start = time.perf_counter()
    task.zero_grad(set_to_none=True)
    task.load_state_dict(kept)
    warm = slice(1, None) if len(training) > 1 else slice(None)
    return median(training[warm]), median(validation[warm])


def plan_fit(
    *,
    epochs: int,
    num_batches: int,
    num_val_batches: int,
    seconds: tuple[float, float],
    budget_minutes: float | None,
) -> FitPlan:
    """All epochs, or as many whole epochs as fit the budget, or shorter epochs where none fits.

    >>> plan = plan_fit(
    ...     epochs=20, num_batches=50, num_val_batches=5, seconds=(1.0, 0.5), budget_minutes=2
    ... )
    >>> plan.epochs, plan.batches_per_epoch
    (2, 50)
    """
    per_step, per_val_batch = seconds
    budget = float("inf") if budget_minutes is None else 60.0 * budget_minutes
    epoch_seconds = num_batches * per_step + num_val_batches * per_val_batch
    val_batches = num_val_batches
    if epoch_seconds * epochs <= budget:
        batches = num_batches
    elif epoch_seconds * min(_SHORTEST_EPOCHS // 2, epochs) <= budget:
        epochs, batches = int(budget // epoch_seconds), num_batches
    else:
        epochs = min(_SHORTEST_EPOCHS, epochs)
        share = budget / epochs
        val_batches = max(1, min(num_val_batches, int(0.2 * share / per_val_batch)))
        remaining = share - val_batches * per_val_batch
        batches = max(1, min(num_batches, int(remaining / per_step)))
    return FitPlan(
        epochs=epochs,
        batches_per_epoch=batches,
        val_batches=val_batches,
        seconds_per_step=per_step,
        seconds_per_val_batch=per_val_batch,
    )


def _uses_cuda(task: SupervisedTask) -> bool:
    return task.settings.accelerator in ("auto", "cuda") and torch.cuda.is_available()


def _seconds_of_step(task: SupervisedTask, batch: Batch) -> float:
    task.set_mode(is_training=True)
    start = time.perf_counter()
    logits = task.net(batch.image)
    task.training_loss(logits, batch).backward()
    return _seconds_since(start)


def _seconds_of_forward(task: SupervisedTask, batch: Batch) -> float:
    task.set_mode(is_training=False)
    start = time.perf_counter()
    with torch.no_grad():
        task.net(batch.image)
    return _seconds_since(start)


def _seconds_since(start: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
