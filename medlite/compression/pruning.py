"""Structured pruning: whole channels go, and the net is a smaller net of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.compression.channel_groups import ChannelGraph, ChannelGroup
from medlite.compression.checks import check_options, training_rules
from medlite.compression.copies import evaluation_copy
from medlite.compression.mamba_channels import is_mamba, keep_inner, score_inner
from medlite.compression.order import Stage
from medlite.compression.structure import record_structure, restore_structure
from medlite.errors import MedliteError
from medlite.types import Batch, CompressionContext, DataSpec

IMPORTANCES = ("taylor", "magnitude")


@dataclass(frozen=True, kw_only=True)
class StructuredPruning:
    """Removes the least important channels of every group of coupled layers, and trains on.

    Groups are found by torch-pruning (Fang et al., "DepGraph", arXiv:2301.12900). Inner channels
    of Mamba blocks are pruned by our own function; the channels between the blocks, attention
    layers and the layers that give the logits keep their size. One shot, the same ratio in every
    group.

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
        pruned = evaluation_copy(net)
        pruned.requires_grad_(True).zero_grad()  # tracing follows gradients
        if self.importance == "taylor":
            batches = context.calibration_batches(self.importance_batches)
            _accumulate_gradients(pruned, batches, context.spec)
        before = _describe_size(pruned, images[:1])
        done = self._prune(pruned, images)
        pruned.zero_grad()
        after = _describe_size(pruned, images[:1])
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

    def _prune(self, net: nn.Module, images: Tensor) -> str:
        """Prune in place; what was done, in words."""
        graph = ChannelGraph(net, images)
        plans = [(group, self._channels_to_remove(group)) for group in graph.groups()]
        removed = [graph.remove(group, channels) for group, channels in plans if channels]
        blocks = [module for module in net.modules() if is_mamba(module)]
        num_blocks = sum(self._prune_inner(block) for block in blocks)
        _sync_groups(net)
        if not num_blocks and not any(removed):
            message = (
                f"nothing could be pruned in {type(net).__name__} at ratio {self.ratio}: none of "
                f"its {len(plans)} groups of channels and {len(blocks)} Mamba blocks can lose "
                f"channels in multiples of {self.round_to}; lower round_to or raise ratio"
            )
            raise MedliteError(message)
        return (
            f"{sum(removed)} of {len(plans)} groups of channels and the inner channels of "
            f"{num_blocks} of {len(blocks)} Mamba blocks"
        )

    def _channels_to_remove(self, group: ChannelGroup) -> list[int]:
        step = math.lcm(self.round_to, group.num_parts)
        num_kept = _num_kept(group.num_channels, self.ratio, step)
        scores = _group_importance(self.importance)(group.members)
        if scores is None or num_kept == group.num_channels or group.num_channels % group.num_parts:
            return []
        by_part = scores.view(group.num_parts, -1).mean(0)
        kept = _largest(by_part, num_kept // group.num_parts)
        part_size = len(by_part)
        lost = sorted(set(range(part_size)) - set(kept))
        return [part * part_size + i for part in range(group.num_parts) for i in lost]

    def _prune_inner(self, block: nn.Module) -> bool:
        scores = score_inner(block, _element_importance(self.importance))
        num_kept = _num_kept(len(scores), self.ratio, self.round_to)
        if num_kept == len(scores):
            return False
        keep_inner(block, _largest(scores, num_kept))
        return True


def _num_kept(num_channels: int, ratio: float, step: int) -> int:
    """Channels that stay: at least the share, rounded up to whole steps, at most all."""
    wanted = num_channels * (1 - ratio)
    return min(num_channels, max(1, math.ceil(wanted / step)) * step)


def _largest(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.topk(count).indices.tolist())


def _group_importance(name: str) -> Callable[[Any], Tensor | None]:
    importances = torch_pruning.importance
    if name == "taylor":
        return importances.GroupTaylorImportance()
    return importances.GroupMagnitudeImportance(p=2)


def _element_importance(name: str) -> Callable[[Tensor], Tensor]:
    if name == "taylor":
        return _first_order_change
    return lambda weight: weight.detach().square()


def _first_order_change(weight: Tensor) -> Tensor:
    gradient = cast("Tensor", weight.grad)
    return (weight.detach() * gradient).abs()


def _accumulate_gradients(net: nn.Module, batches: Iterable[Batch], spec: DataSpec) -> None:
    for batch in batches:
        net.train().eval()  # drops what attention layers cached of the last batch's graph
        _task_loss(net(batch.image), batch.target, spec).backward()
    for parameter in net.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _task_loss(logits: Tensor, target: Tensor, spec: DataSpec) -> Tensor:
    if spec.labels == "multiclass":
        return F.cross_entropy(logits, target)
    return F.binary_cross_entropy_with_logits(logits, target.view_as(logits).float())


def _sync_groups(net: nn.Module) -> None:
    """Repeat the groups of pruned depth-wise convolutions where timm's blocks keep a copy."""
    for module in net.modules():
        convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m is not module]
        if isinstance(getattr(module, "groups", None), int) and convolutions:
            vars(module)["groups"] = convolutions[0].groups


@torch.no_grad()
def _describe_size(net: nn.Module, image: Tensor) -> str:
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    with FlopCounterMode(display=False) as counter:
        net(image)
    macs = counter.get_total_flops() / 2
    return f"{num_parameters:,} parameters and {macs / 1e6:,.1f} million multiply-adds an image"
