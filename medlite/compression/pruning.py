"""Structured pruning: whole channels go, and the net is a smaller net of the same kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from medlite.compression.channel_groups import ChannelGroup, find_groups
from medlite.compression.channel_importance import IMPORTANCES, accumulate_gradients, score_units
from medlite.compression.channel_removal import remove_units
from medlite.compression.channel_trace import label_channels
from medlite.compression.checks import check_options, training_rules
from medlite.compression.copies import evaluation_copy
from medlite.compression.order import Stage
from medlite.compression.structure import record_structure, restore_structure
from medlite.errors import MedliteError
from medlite.types import CompressionContext, DataSpec


@dataclass(frozen=True, kw_only=True)
class StructuredPruning:
    """Removes the least important channels of every group of coupled layers, and trains on.

    Groups are found as in DepGraph (Fang et al., arXiv:2301.12900; see
    `medlite.compression.channel_groups`), in state-space models both the inner channels and those
    between the blocks. States, heads, and the channels of images and logits stay, and so do
    channels that an unknown operator reads, that scale the scores of attention, or whose number
    a layer does not read from its weights. One shot, the same ratio in every group. What is left
    is computed as before, but statistics over channels (layer and group normalisation, spatial
    attention) are those of the channels that are left.

    Args:
        ratio: share of the channels that goes, in (0, 1).
        epochs: further epochs afterwards, on all training data.
        learning_rate: peak learning rate; about a third of the first training's.
        importance: "taylor" (Molchanov et al., arXiv:1906.10771: the change of the loss to first
            order, from training batches) or "magnitude" (L2 norm of the weights, no data).
        round_to: numbers of channels stay multiples of this, which kernels are fast for.
        importance_batches: training batches behind "taylor".
    """

    stage: ClassVar[Stage] = "structure"

    epochs: int
    learning_rate: float
    ratio: float = 0.5
    importance: str = "taylor"
    round_to: int = 8
    importance_batches: int = 8

    def __post_init__(self) -> None:
        check_options(
            [
                *training_rules(self.epochs, self.learning_rate),
                ("ratio", self.ratio, 0 < self.ratio < 1, "in (0, 1)"),
                (
                    "importance",
                    self.importance,
                    self.importance in IMPORTANCES,
                    f"one of {', '.join(IMPORTANCES)}",
                ),
                ("round_to", self.round_to, self.round_to >= 1, "a whole number from 1 up"),
                (
                    "importance_batches",
                    self.importance_batches,
                    self.importance_batches >= 1,
                    "a whole number from 1 up",
                ),
            ]
        )

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the smaller, trained net and its structure; `net` stays as it is.

        Raises:
            MedliteError: not one channel could be removed.
        """
        images = torch.zeros(2, *context.spec.input_shape)
        whole = evaluation_copy(net)
        whole.requires_grad_(True).zero_grad()
        if self.importance == "taylor":
            batches = context.calibration_batches(self.importance_batches)
            accumulate_gradients(whole, batches, context.spec)
        pruned, done = self._prune(whole, images)
        before, after = (_describe_size(some, images[:1]) for some in (whole, pruned))
        context.report(
            "pruning",
            f"ratio {self.ratio} by {self.importance} in {done}: from {before} to {after}",
        )
        structure = record_structure(net, pruned)
        trained = context.fit(
            pruned, name="prune", epochs=self.epochs, learning_rate=self.learning_rate
        )
        return trained, structure

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Give a copy of `net` the pruned sizes; its weights are still to be loaded."""
        pruned = evaluation_copy(net)
        restore_structure(pruned, state)
        return pruned

    def _prune(self, net: nn.Module, images: Tensor) -> tuple[nn.Module, str]:
        """A pruned copy, and what was done in words."""
        classes, weights = label_channels(net, images), dict(net.named_parameters())
        plans = [(group, self._units_to_remove(group, weights)) for group in find_groups(classes)]
        chosen = [(group, units) for group, units in plans if units]
        pruned, done = remove_units(net, images, classes, chosen)
        if not done:
            message = (
                f"nothing could be pruned in {type(net).__name__} at ratio {self.ratio}: none of "
                f"its {len(plans)} groups of channels can lose channels in multiples of "
                f"{self.round_to}; lower round_to or raise ratio"
            )
            raise MedliteError(message)
        return pruned, f"{len(done)} of {len(plans)} groups of channels"

    def _units_to_remove(self, group: ChannelGroup, weights: Mapping[str, Tensor]) -> list[int]:
        step = math.lcm(self.round_to, group.unit_size) // group.unit_size
        wanted = group.num_units * (1 - self.ratio)
        num_kept = max(1, math.ceil(wanted / step)) * step
        if num_kept >= group.num_units:
            return []
        scores = score_units(group, weights, self.importance)
        return scores.topk(group.num_units - num_kept, largest=False).indices.tolist()


@torch.no_grad()
def _describe_size(net: nn.Module, image: Tensor) -> str:
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    # fused attention has no formula on the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(image)
    macs = counter.get_total_flops() / 2
    return f"{num_parameters:,} parameters and {macs / 1e6:,.1f} million multiply-adds an image"
