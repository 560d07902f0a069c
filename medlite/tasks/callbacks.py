"""What is done after each epoch, where Lightning's own way does not do."""

from __future__ import annotations

import math

import lightning
from lightning.pytorch.callbacks import EarlyStopping


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
