"""One fit: from a net to its best weights, the same after a kill as without one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn

from medlite.errors import ConfigError
from medlite.tasks.callbacks import BestCheckpoint, Patience
from medlite.tasks.checkpoints import AtomicCheckpointIO, load_tensors
from medlite.tasks.plan import FitPlan, plan_fit, time_steps
from medlite.tasks.supervised import SupervisedTask
from medlite.types import DataSpec, FitHooks, TrainSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """A trained net (evaluation mode), its curves and its cost.

    history: one dict an epoch: epoch, loss, val/loss, val/<metric> ..., learning_rate.
    """

    net: nn.Module
    history: list[dict[str, float]]
    seconds: float
    plan: FitPlan


def fit(
    net: nn.Module,
    *,
    spec: DataSpec,
    data: lightning.LightningDataModule,
    settings: TrainSettings,
    directory: Path,
    seed: int,
    hooks: FitHooks | None = None,
    loggers: Sequence[Logger] = (),
    announce: Callable[[FitPlan], None] = lambda plan: None,
) -> FitResult:
    """Train `net` in place and give it its best weights by validation metric.

    Where the metric is undefined in every epoch, as AUC is on a split of one class, there is no
    best epoch: the weights are those of the last one, with a warning.

    Every epoch ends in a checkpoint in `directory`; the same call after a kill goes on from the
    last one and ends in the same weights, since order, augmentation and dropout depend on
    (seed, epoch, sample) alone. After the end it trains nothing more.

    Args:
        net: as `SupervisedTask` takes it.
        spec: of the data.
        data: loaders of `medlite.types.Batch`.
        settings: epochs, budget, optimiser.
        directory: where checkpoints and the plan live.
        seed: of everything random in this fit.
        hooks: how a compression step changes the fit.
        loggers: Lightning loggers for the curves.
        announce: called with the plan before the first step.

    Raises:
        TrainingError: a loss is not finite.
        RecordError: a checkpoint is damaged or unsafe.
        ConfigError: the accelerator that is asked for is not here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    task = SupervisedTask(net, spec=spec, settings=settings, seed=seed, hooks=hooks)
    plan = plan_once(task, data, directory / "plan.json")
    task.total_steps = plan.total_steps
    announce(plan)
    history = History()
    last, finished = directory / "last.ckpt", directory / "finished"
    task.set_mode(is_training=True)
    if finished.exists() and last.exists():
        history.load_state_dict(load_tensors(last)["callbacks"][history.state_key])
    else:
        trainer = _build_trainer(task, plan, directory, [history], loggers)
        trainer.fit(task, datamodule=data, ckpt_path=last if last.exists() else None)
        finished.touch()
    load_best(net, directory, is_defined=_is_defined(history.rows, task.monitor))
    task.cpu()
    task.set_mode(is_training=False)
    return FitResult(net=net, history=history.rows, seconds=history.seconds, plan=plan)


def load_best(net: nn.Module, directory: Path, *, is_defined: bool) -> None:
    """Give `net` the best weights that a fit left in `directory`.

    Args:
        net: the trained one.
        directory: of the fit.
        is_defined: whether there is a best epoch; otherwise the last one is taken.
    """
    file = directory / ("best.ckpt" if is_defined else "last.ckpt")
    if not file.exists():
        _log.warning("%s is gone: the weights of the last epoch are taken", file)
        file = directory / "last.ckpt"
    state = load_tensors(file)["state_dict"]
    net.load_state_dict(
        {name[4:]: value for name, value in state.items() if name.startswith("net.")}
    )


def _is_defined(rows: Sequence[dict[str, float]], monitor: str) -> bool:
    """Whether any epoch has the metric that tells the best one."""
    is_defined = any(math.isfinite(row[monitor]) for row in rows)
    if not is_defined:
        _log.warning(
            "%s is undefined in every epoch, so no epoch is the best one: the weights of the last "
            "epoch are taken; give a validation split that holds every class",
            monitor,
        )
    return is_defined


class History(Callback):
    """One dict an epoch; part of the checkpoint, so that a resumed fit keeps its curves."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self._epoch_start = 0.0

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Log the epochs of before once more where a logger begins its file anew."""
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                for row in self.rows:
                    step = (int(row["epoch"]) + 1) * int(trainer.num_training_batches) - 1
                    logger.log_metrics({**row}, step=step)

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Start the clock."""
        self._epoch_start = time.perf_counter()

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Keep the epoch's figures."""
        self.seconds += time.perf_counter() - self._epoch_start
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        self.rows.append({"epoch": trainer.current_epoch, "learning_rate": rate, **metrics})

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return {"rows": self.rows, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rows, self.seconds = list(state_dict["rows"]), state_dict["seconds"]


def plan_once(task: SupervisedTask, data: lightning.LightningDataModule, path: Path) -> FitPlan:
    """The plan in `path`, made from a timing of a few steps where there is none yet.

    Raises:
        ConfigError: the accelerator that is asked for is not here.
    """
    if task.settings.accelerator == "cuda" and not torch.cuda.is_available():
        problem = (
            "train.accelerator: 'cuda', but torch sees no CUDA device here; take "
            "train.accelerator=auto"
        )
        raise ConfigError([problem])
    if path.exists():
        return FitPlan.read(path)
    loader, val_loader = data.train_dataloader(), data.val_dataloader()
    plan = plan_fit(
        epochs=task.settings.epochs,
        num_batches=len(loader),
        num_val_batches=len(val_loader),
        seconds=time_steps(task, loader),
        budget_minutes=task.settings.budget_minutes,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    plan.write(path)
    return plan


def _build_trainer(
    task: SupervisedTask,
    plan: FitPlan,
    directory: Path,
    callbacks: list[Callback],
    loggers: Sequence[Logger],
) -> lightning.Trainer:
    settings = task.settings
    accelerator = {"cuda": "gpu"}.get(settings.accelerator, settings.accelerator)
    return lightning.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=_precision(settings),
        max_epochs=plan.epochs,
        limit_train_batches=plan.batches_per_epoch,
        limit_val_batches=plan.val_batches,
        gradient_clip_val=settings.gradient_clip,
        deterministic="warn" if settings.deterministic else False,
        callbacks=[*callbacks, *_standard_callbacks(task, directory), RichProgressBar()],
        plugins=[AtomicCheckpointIO()],
        logger=list(loggers) or False,
        default_root_dir=directory,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_model_summary=False,
    )


def _standard_callbacks(task: SupervisedTask, directory: Path) -> list[Callback]:
    settings = task.settings
    options: dict[str, Any] = {"dirpath": directory, "save_on_train_epoch_end": True}
    options["enable_version_counter"] = False
    callbacks: list[Callback] = [
        BestCheckpoint(filename="best", monitor=task.monitor, mode="max", **options),
        ModelCheckpoint(filename="last", **options),
    ]
    if settings.early_stopping_patience is not None:
        patience = settings.early_stopping_patience
        callbacks.append(Patience(task.monitor, patience=patience, mode="max"))
    if settings.ema_decay is not None and task.hooks.set_mode is None:
        callbacks.append(EMAWeightAveraging(decay=settings.ema_decay))
    return callbacks


def _precision(settings: TrainSettings) -> Any:
    named = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    if settings.precision != "auto":
        return named[settings.precision]
    is_on_cuda = settings.accelerator != "cpu" and torch.cuda.is_available()
    return named["bf16" if is_on_cuda and torch.cuda.is_bf16_supported() else "32"]


def shortened(settings: TrainSettings, *, epochs: int, learning_rate: float) -> TrainSettings:
    """The same settings for a fine-tuning fit."""
    return replace(settings, epochs=epochs, learning_rate=learning_rate)
