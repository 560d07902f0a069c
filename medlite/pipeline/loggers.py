"""Weights & Biases (offline by default), csv, or nothing: one run a job."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from medlite.config import JobConfig
from medlite.report.redact import redact_paths
from medlite.tasks.checkpoints import save_text


@dataclass(frozen=True, kw_only=True)
class Sinks:
    """Where a job's curves and results go.

    loggers: the name of a fit -> Lightning loggers. wandb_run: None without W&B.
    """

    loggers: Callable[[str], list[Logger]]
    wandb_run: Any | None


@contextmanager
def open_sinks(config: JobConfig) -> Iterator[Sinks]:
    """The loggers that `logger=` chose; a W&B run is finished whatever happens inside."""
    if config.logger.kind == "none":
        yield Sinks(loggers=lambda fit_name: [], wandb_run=None)
    elif config.logger.kind == "csv":
        yield Sinks(
            loggers=lambda fit_name: [CSVLogger(config.directory, name="curves", version=fit_name)],
            wandb_run=None,
        )
    else:
        with _open_wandb(config) as sinks:
            yield sinks


@contextmanager
def _open_wandb(config: JobConfig) -> Iterator[Sinks]:
    import wandb

    run = wandb.init(
        project=config.logger.project,
        mode="online" if config.logger.mode == "online" else "offline",
        group=config.logger.group,
        name=config.name,
        id=_run_id(config.directory / "wandb_id.txt"),
        resume="allow",
        dir=config.directory,
        config=redact_paths(config.resolved),
        settings=wandb.Settings(silent=True, console="off"),
    )
    exit_code = 1

    def loggers(fit_name: str) -> list[Logger]:
        return [WandbLogger(experiment=run, prefix=f"fit/{fit_name}")]

    try:
        yield Sinks(loggers=loggers, wandb_run=run)
        exit_code = 0
    finally:
        wandb.finish(exit_code=exit_code)


def _run_id(path: Path) -> str:
    """Kept in the run directory, so that a resumed run stays one run."""
    if not path.exists():
        save_text(secrets.token_hex(4), path)
    return path.read_text()
