"""What is done after each epoch, where Lightning's own way does not do."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

_log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """The best weights so far, also after the folder of a stopped fit was moved.

    Lightning forgets the best score where the folder has another path than before, and then takes
    the next epoch for the best one. Where the best weights themselves are gone, the next epoch is
    the best one indeed.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, with the paths of today."""
        if not Path(self._here(state_dict["best_model_path"])).is_file():
            _log.warning("%s is gone: the best epoch is sought anew from here on", self.dirpath)
            return
        scores = state_dict["best_k_models"].items()
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        super().load_state_dict(
            {
                **state_dict,
                **{name: self._here(state_dict[name]) for name in paths},
                "best_k_models": {self._here(path): score for path, score in scores},
                "dirpath": self.dirpath,
            }
        )

    def _here(self, path: str) -> str:
        return str(Path(self.dirpath or "") / Path(path).name) if path else path


class Patience(EarlyStopping):
    """Early stopping that passes over epochs in which the metric is undefined.

    Lightning's own stops the fit there, or counts them as epochs without a gain.
    """

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Check after training, where that is asked for."""
        if self._is_defined(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Check after validation."""
        if self._is_defined(trainer):
            super().on_validation_end(trainer, pl_module)

    def _is_defined(self, trainer: lightning.Trainer) -> bool:
        return math.isfinite(float(trainer.callback_metrics.get(self.monitor, 0.0)))
