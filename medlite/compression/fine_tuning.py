"""Fine-tuning: further training of the net as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from medlite.compression.checks import check_options, training_rules
from medlite.compression.copies import evaluation_copy
from medlite.compression.order import Stage
from medlite.types import CompressionContext, DataSpec


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Trains on with the task's own loss: makes nothing smaller, and may mend what a step broke.

    It is also the control of every step that trains: what the same further epochs do to the
    uncompressed net is not the merit of the compression.

    Args:
        epochs: further epochs, on all training data.
        learning_rate: peak learning rate; about a tenth of the first training's.
    """

    stage: ClassVar[Stage] = "train"

    epochs: int
    learning_rate: float

    def __post_init__(self) -> None:
        check_options(training_rules(self.epochs, self.learning_rate))

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the net trained on; `net` stays as it is."""
        trained = context.fit(
            evaluation_copy(net),
            name="finetune",
            epochs=self.epochs,
            learning_rate=self.learning_rate,
        )
        context.report("fine-tuning", f"{self.epochs} epochs at {self.learning_rate:g}")
        return trained, {}

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Return `net`: fine-tuning changes no structure."""
        return net
