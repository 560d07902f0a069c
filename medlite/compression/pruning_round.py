"""Structured pruning turn by turn: score, choose, remove."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from medlite.compression.channel_groups import ChannelGroup, find_groups
from medlite.compression.channel_importance import accumulate_evidence, score_units, scored_weights
from medlite.compression.channel_removal import Plan, remove_units
from medlite.compression.channel_trace import Place, label_channels
from medlite.compression.copies import evaluation_copy, freeze_like
from medlite.compression.pruning_choice import (
    Candidate,
    Choice,
    GroupKey,
    group_key,
    protected_places,
    without,
)
from medlite.compression.pruning_target import Found, Goal, search
from medlite.errors import MedliteError
from medlite.types import Batch, CompressionContext


@dataclass(kw_only=True)
class Pruner:
    """Prunes a net in one turn or several; `StructuredPruning` says what the options mean.

    `goal` is None where the share of channels itself is asked for. `first_sizes` says how many
    units each group had before the first turn, `pruned` which groups lost some, and `notes` what
    else the card should say.
    """

    context: CompressionContext
    choice: Choice
    goal: Goal | None
    importance: str
    importance_batches: int
    protect: Sequence[str]
    seed: int
    first_sizes: dict[GroupKey, int] = field(default_factory=dict)
    pruned: set[GroupKey] = field(default_factory=set)
    notes: dict[str, str] = field(default_factory=dict)
    num_turns: int = 0

    def prune(self, net: nn.Module, left: float, *, turn: str) -> nn.Module:
        """A copy of which at most this share of what the first net had is left.

        Args:
            net: the first net, or what the turn before left of it; stays as it is.
            left: share, in (0, 1).
            turn: its name, for the card.

        Raises:
            MedliteError: out of reach, no channel can be scored, or `protect` names no layer.
        """
        images = torch.zeros(2, *self.context.spec.input_shape)
        whole = evaluation_copy(net)
        whole.requires_grad_(True).zero_grad()
        classes = label_channels(whole, images)
        surgery = _Surgery(whole, images, classes)
        candidates = self._candidates(whole, find_groups(classes))
        if self.goal is None:
            pruned, done = surgery.remove(self.choice.plans(candidates, left))
        else:
            pruned, done = self._reach(self.goal, surgery, candidates, left, turn)
        self.pruned |= {group_key(group) for group, _ in done}
        self.num_turns += 1
        freeze_like(pruned, net)
        return pruned

    def _candidates(self, net: nn.Module, groups: list[ChannelGroup]) -> list[Candidate]:
        weights = scored_weights(net, self.importance)
        free = without(groups, protected_places(net, self.protect))
        scored = [g for g in free if self._is_scored(g, weights)]
        if free and not scored:
            message = (
                f"importance=bn_scale ranks channels by batch normalisation, and none of those "
                f"that {type(net).__name__} could lose have any; choose importance=magnitude"
            )
            raise MedliteError(message)
        if not self.num_turns:
            self.first_sizes = {group_key(group): group.num_units for group in groups}
            self._note_kept(len(groups) - len(free), len(free) - len(scored))
        accumulate_evidence(net, self._batches(), self.context.spec, self.importance)
        with torch.random.fork_rng(devices=[]):
            # A turn that is made again after a kill must choose the same units.
            torch.manual_seed(self.seed + self.num_turns)
            return [
                Candidate(g, score_units(g, weights, self.importance), first_size)
                for g in scored
                if (first_size := self.first_sizes.get(group_key(g)))
            ]

    def _is_scored(self, group: ChannelGroup, weights: Mapping[str, Tensor]) -> bool:
        """Without a batch normalisation in it, "bn_scale" knows nothing of a group."""
        return self.importance != "bn_scale" or any(m.name in weights for m in group.members)

    def _note_kept(self, num_protected: int, num_without_norm: int) -> None:
        if self.protect:
            text = f"{', '.join(self.protect)}: {num_protected} groups of channels stay whole"
            self.notes["protected from pruning"] = text
        if num_without_norm:
            text = f"{num_without_norm} groups of channels without batch normalisation stay whole"
            self.notes["not scored by bn_scale"] = text

    def _batches(self) -> Sequence[Batch]:
        if self.importance not in ("taylor", "hessian"):
            return []
        batches = self.context.calibration_batches(self.importance_batches)
        if self.context.is_dry and self.importance == "hessian":  # a backward pass an image
            return [Batch(*(part[:1] for part in batch)) for batch in batches[:1]]
        return batches

    def _reach(
        self, goal: Goal, surgery: _Surgery, candidates: list[Candidate], left: float, turn: str
    ) -> tuple[nn.Module, list[Plan]]:
        """The largest net that the goal allows; groups that do not go along are left out."""
        while True:
            found = search(
                self._trial(goal, surgery, candidates),
                left,
                least=1 - self.choice.max_ratio,
                most_tries=goal.most_tries,
            )
            plans = self.choice.plans(candidates, found.share_left)
            pruned, done = surgery.remove(plans)
            if len(done) == len(plans):
                break
            unsound = {group_key(g) for g, _ in plans} - {group_key(g) for g, _ in done}
            candidates = [c for c in candidates if group_key(c.group) not in unsound]
        if found.reached > left and goal.is_exact:
            raise MedliteError(self._say_out_of_reach(goal, found, left))
        self.notes[f"target of {turn}"] = goal.describe(found, left)
        return pruned, done

    def _trial(
        self, goal: Goal, surgery: _Surgery, candidates: Sequence[Candidate]
    ) -> Callable[[float], tuple[Hashable, Callable[[], float]]]:
        def trial(share_left: float) -> tuple[Hashable, Callable[[], float]]:
            plans = self.choice.plans(candidates, share_left)
            look = tuple((group_key(group), len(units)) for group, units in plans)
            return look, lambda: goal.share(surgery.draft(plans))

        return trial

    def _say_out_of_reach(self, goal: Goal, found: Found, left: float) -> str:
        return (
            f"target={goal.target}: no pruning leaves {left:.1%} of the {goal.what} of this net; "
            f"the least that it leaves is {found.reached:.1%}, with max_ratio="
            f"{self.choice.max_ratio} and round_to={self.choice.round_to}; lower ratio or "
            "round_to, raise max_ratio, or protect less"
        )


@dataclass(frozen=True)
class _Surgery:
    """A net from which units are removed, and what `remove_units` needs to know of it."""

    net: nn.Module
    images: Tensor
    classes: Mapping[Place, Tensor]

    def remove(self, plans: Sequence[Plan]) -> tuple[nn.Module, list[Plan]]:
        return remove_units(self.net, self.images, self.classes, plans)

    def draft(self, plans: Sequence[Plan]) -> nn.Module:
        return remove_units(self.net, self.images, self.classes, plans, is_draft=True)[0]
