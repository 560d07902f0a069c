"""Structured pruning: whole channels go, and the net is a smaller net of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from medlite.compression.channel_importance import IMPORTANCES
from medlite.compression.checks import check_options, training_rules
from medlite.compression.copies import evaluation_copy
from medlite.compression.order import Stage
from medlite.compression.pruning_choice import SCOPES, Choice
from medlite.compression.pruning_round import Pruner
from medlite.compression.pruning_target import MOST_TIMED, TARGETS, describe_size, goal_of
from medlite.compression.structure import record_structure, restore_structure
from medlite.errors import MedliteError
from medlite.types import CompressionContext, DataSpec


@dataclass(frozen=True, kw_only=True)
class StructuredPruning:
    """Removes the least important channels of groups of coupled layers, and trains on.

    Groups are found as in DepGraph (Fang et al., arXiv:2301.12900; see
    `medlite.compression.channel_groups`), in state-space models both the inner channels and those
    between the blocks. States, heads, and the channels of images and logits stay, and so do
    channels that an unknown operator reads, that scale the scores of attention, or whose number
    a layer does not read from its weights. What is left is computed as before, but statistics
    over channels (layer and group normalisation, spatial attention) are those of the channels
    that are left.

    Args:
        ratio: share of what `target` names that goes, in (0, 1).
        epochs: further epochs on all training data, all iterations together.
        learning_rate: peak learning rate of each iteration. Both are those of the first training
            by default, as a net that lost much recovers best by the schedule it was trained with
            (Renda et al., arXiv:2003.02389).
        target: "ratio" (channels), "macs" (multiply-adds), "params" (parameters) or "latency"
            (the time of one image, measured on the first runtime of the run). All but the first
            are searched by bisection for the largest net within them. Latency is noisy, and small
            nets have much that no pruning shortens: where even the smallest net is too slow, it
            is taken, and the card says so.
        scope: "local" (every group loses the same share) or "global" (the units of all groups
            are ranked by their importance relative to the mean of their group).
        max_ratio: share of its channels that a group loses at most, in (0, 1), where groups lose
            unequal shares or the share is searched.
        iterations: prune and train in so many turns, each of which removes the same share of
            what the one before it left; importances are found anew in each.
        importance: "magnitude" (L2 norm of the weights of all layers of the group, as in DepGraph,
            no data), "taylor" (the change of the cross-entropy to first order, after Molchanov et
            al., arXiv:1906.10771, from the gradient summed over training batches), "bn_scale" (the
            scales of batch normalisation, Liu et al., "Network Slimming", arXiv:1708.06519,
            without its sparse training; groups without batch normalisation stay), "hessian"
            (Optimal Brain Damage, LeCun et al., 1989, with the diagonal of the empirical Fisher
            for the Hessian) or "random" (a control, and no weak one: Li et al.,
            arXiv:2205.05676).
        round_to: numbers of channels stay multiples of this, which kernels are fast for.
        importance_batches: training batches behind "taylor" and "hessian".
        protect: names of layers, or of blocks of layers, that keep their output channels. A name
            matches wherever it is a run of whole components of a layer's path. The heads of
            attention are whole and logits complete without it.
    """

    stage: ClassVar[Stage] = "structure"

    epochs: int
    learning_rate: float
    ratio: float = 0.5
    target: str = "ratio"
    scope: str = "local"
    max_ratio: float = 0.9
    iterations: int = 1
    importance: str = "magnitude"
    round_to: int = 8
    importance_batches: int = 8
    protect: Sequence[str] = ()

    def __post_init__(self) -> None:
        named = {
            "target": (self.target, TARGETS),
            "scope": (self.scope, SCOPES),
            "importance": (self.importance, IMPORTANCES),
        }
        counts = {"round_to": self.round_to, "importance_batches": self.importance_batches}
        check_options(
            [
                *training_rules(self.epochs, self.learning_rate),
                ("ratio", self.ratio, 0 < self.ratio < 1, "in (0, 1)"),
                ("max_ratio", self.max_ratio, 0 < self.max_ratio < 1, "in (0, 1)"),
                *(
                    (k, v, v in names, f"one of {', '.join(names)}")
                    for k, (v, names) in named.items()
                ),
                *(
                    (key, count, count >= 1, "a whole number from 1 up")
                    for key, count in counts.items()
                ),
                (
                    "iterations",
                    self.iterations,
                    1 <= self.iterations <= max(1, self.epochs),
                    f"from 1 to the {self.epochs} epochs, of which each needs one",
                ),
            ]
        )

    @property
    def num_latencies(self) -> int:
        """Nets that are timed at most."""
        return (1 + MOST_TIMED * self.iterations) if self.target == "latency" else 0

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the smaller, trained net and its structure; `net` stays as it is.

        Raises:
            MedliteError: not one channel could be removed or scored, the target is out of reach, or
                `protect` names no layer.
        """
        shape = context.spec.input_shape
        current = evaluation_copy(net)
        pruner = Pruner(
            context=context,
            choice=Choice(scope=self.scope, round_to=self.round_to, max_ratio=self.max_ratio),
            goal=goal_of(self.target, current, context),
            importance=self.importance,
            importance_batches=self.importance_batches,
            protect=self.protect,
            seed=torch.initial_seed(),
        )
        sizes = [describe_size(current, shape)]
        for index, epochs in enumerate(_shared(self.epochs, self.iterations)):
            # Powers, so that every turn takes the same share of what is left.
            left = (1 - self.ratio) ** ((index + 1) / self.iterations)
            name = "prune" if self.iterations == 1 else f"prune_{index + 1}"
            current = pruner.prune(current, left, turn=name)
            is_last = index + 1 == self.iterations
            if is_last and not pruner.pruned:
                raise MedliteError(self._say_nothing_went(net, len(pruner.first_sizes)))
            sizes.append(describe_size(current, shape))
            current = context.fit(
                current, name=name, epochs=epochs, learning_rate=self.learning_rate
            )
        self._report(context, pruner, sizes)
        return current, record_structure(net, current)

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Give a copy of `net` the pruned sizes; its weights are still to be loaded."""
        pruned = evaluation_copy(net)
        restore_structure(pruned, state)
        return pruned

    def _report(self, context: CompressionContext, pruner: Pruner, sizes: Sequence[str]) -> None:
        what = f" of the {pruner.goal.what}" if pruner.goal else ""
        scope = "" if self.scope == "local" else ", all groups ranked together,"
        context.report(
            "pruning",
            f"ratio {self.ratio}{what} by {self.importance}{scope} in {len(pruner.pruned)} "
            f"of {len(pruner.first_sizes)} groups of channels: from {sizes[0]} to {sizes[-1]}",
        )
        if self.iterations > 1:
            turns = "; ".join(f"prune_{i}: {size}" for i, size in enumerate(sizes[1:], start=1))
            context.report("pruning in turns", turns)
        for topic, text in pruner.notes.items():
            context.report(topic, text)

    def _say_nothing_went(self, net: nn.Module, num_groups: int) -> str:
        return (
            f"nothing could be pruned in {type(net).__name__} at ratio {self.ratio}: none of "
            f"its {num_groups} groups of channels can lose channels in multiples of "
            f"{self.round_to}; lower round_to or raise ratio"
        )


def _shared(epochs: int, num_parts: int) -> list[int]:
    """Nearly equal parts; the last ones, which end it, are the longer ones."""
    return [epochs * (i + 1) // num_parts - epochs * i // num_parts for i in range(num_parts)]
