"""The one LightningModule: a net, a loss, a metric and a schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor, nn

from medlite.errors import TrainingError
from medlite.metrics.task import build_metrics, primary_metric
from medlite.tasks.losses import build_loss
from medlite.types import Batch, DataSpec, FitHooks, TrainSettings

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler


_UNDECAYED = ("bias", "A_log", "A_logs")
"""how names of parameters end that are not decayed though they have a row for each direction"""


class SupervisedTask(lightning.LightningModule):
    """Classification or segmentation, as `spec` says.

    Args:
        net: (B, C, H, W[, D]) float32 -> logits (B, K) or (B, K, H, W[, D]).
        spec: decides loss and metrics.
        settings: optimiser, loss and schedule.
        total_steps: length of the schedule (warm-up, then cosine to zero).
        seed: of what is random inside the net; combined with the step.
        hooks: how a compression step changes the fit.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        spec: DataSpec,
        settings: TrainSettings,
        total_steps: int = 1,
        seed: int = 0,
        hooks: FitHooks | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.settings = settings
        self.total_steps = total_steps
        self.seed = seed
        self.hooks = hooks or FitHooks()
        self.auxiliary = self.hooks.auxiliary
        self.loss = build_loss(spec, name=settings.loss, class_weights=settings.class_weights)
        self.metrics = build_metrics(spec)
        self.monitor = f"val/{primary_metric(spec)}"

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.net(image)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss to minimise.

        Raises:
            TrainingError: the loss is not finite; names the batch and its samples.
        """
        logits = self.net(batch.image)
        loss = self.training_loss(logits, batch)
        if not torch.isfinite(loss):
            raise TrainingError(self._describe_bad_batch(batch, batch_idx, logits))
        self.log("loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def training_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss to minimise: the task's own, or what a step makes of it."""

        def task_loss(logits: Tensor) -> Tensor:
            return self.loss(logits, batch.target)

        if self.hooks.loss is None:
            return task_loss(logits)
        return self.hooks.loss(logits, batch, task_loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect loss and metrics."""
        logits = self.net(batch.image)
        self.log("val/loss", self.loss(logits, batch.target), batch_size=len(logits))
        self.metrics.update(logits, batch.target)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation split."""
        for name, value in self.metrics.compute().items():
            self.log(f"val/{name}", value.float(), prog_bar=f"val/{name}" == self.monitor)
        self.metrics.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits, for callbacks that collect them."""
        return self.net(batch.image)

    def on_train_epoch_start(self) -> None:
        """Set the mode, and tell the step that hooked in."""
        self.set_mode(is_training=True)
        if self.hooks.on_epoch_start is not None:
            epochs = self.trainer.max_epochs or 1
            self.hooks.on_epoch_start(self.net, self.current_epoch / epochs)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed what is random inside the net by the step, so that a resumed run repeats it."""
        torch.manual_seed((self.seed + 1) * 1_000_003 + self.global_step)

    def on_validation_model_eval(self) -> None:
        """Go to evaluation mode by the hook where there is one: exported graphs need it."""
        self.set_mode(is_training=False)

    def on_validation_model_train(self) -> None:
        """Return to training mode, likewise."""
        self.set_mode(is_training=True)

    def on_test_model_eval(self) -> None:
        """Go to evaluation mode, likewise."""
        self.set_mode(is_training=False)

    def on_test_model_train(self) -> None:
        """Stay in evaluation mode after a test."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW without decay on norms, biases and state matrices; warm-up and cosine."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            _parameter_groups(self, settings.weight_decay), lr=settings.learning_rate
        )
        warmup = max(1, round(settings.warmup_ratio * self.total_steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, warmup=warmup, total=self.total_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def set_mode(self, *, is_training: bool) -> None:
        """Switch the net between training and evaluation, by the hook where there is one."""
        if self.hooks.set_mode is None:
            self.net.train(is_training)
        else:
            self.hooks.set_mode(self.net, is_training)

    def _describe_bad_batch(self, batch: Batch, batch_idx: int, logits: Tensor) -> str:
        is_bad_image = ~torch.isfinite(batch.image.flatten(1)).all(dim=1)
        bad = batch.position[is_bad_image].tolist()
        if bad:
            cause = f"the images at training positions {bad} hold NaN or infinite pixels"
        elif not torch.isfinite(logits).all():
            cause = (
                "the net's output overflowed: lower train.learning_rate or set train.precision=32"
            )
        else:
            cause = "the loss itself overflowed: lower train.learning_rate"
        return (
            f"the loss is not finite at epoch {self.current_epoch}, batch {batch_idx} "
            f"(training positions {batch.position.tolist()}): {cause}"
        )


def warmup_cosine(step: int, *, warmup: int, total: int) -> float:
    """Factor of the learning rate: linear to 1 over `warmup` steps, then cosine to 0.

    >>> [round(warmup_cosine(step, warmup=2, total=6), 2) for step in range(7)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_free = parameter.ndim <= 1 or name.endswith(_UNDECAYED)
            (free if is_free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    return [*groups, {"params": free, "weight_decay": 0.0}]
