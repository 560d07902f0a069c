"""Low-rank factorisation: one layer becomes two or three thin ones."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import nn

from medlite.compression.checks import check_options, training_rules
from medlite.compression.copies import evaluation_copy
from medlite.compression.low_rank_choice import RankChoices, choose_within, rank_choices
from medlite.compression.low_rank_factors import (
    Factorable,
    Ranks,
    factor_shapes,
    factorised,
    factors,
    unfoldings,
)
from medlite.compression.low_rank_layers import Survey, replace_layer, survey_layers
from medlite.compression.order import Stage
from medlite.compression.variational_rank import variational_rank
from medlite.errors import MedliteError
from medlite.types import CompressionContext, DataSpec

RANK_RULES = ("budget", "energy", "vbmf")

MOST_NAMES = 8
"""layers that the card names, of each kind"""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Cuts layers into thin ones of low rank, and trains on.

    Linear layers and 1x1 convolutions become two by a truncated SVD, convolutions with larger
    kernels three (1x1, kernel, 1x1) by the Tucker-2 of Kim et al., arXiv:1511.06530, in 2-D and
    3-D. The ranks are at least 8. The paper takes them from variational Bayes alone; here they
    come from a budget of multiply-adds, for the weights of nets of this size look full of rank to
    an energy rule (nothing is saved) and full of noise to variational Bayes (nothing is left).

    A layer stays whole where no rank saves multiply-adds; where it is grouped, transposed, of a
    class of its own, hooked, or shares its weight; and where a forward pass (in evaluation, in
    training, or of the deployed form) does not call it or reads its weights or sizes from
    outside. Only weights decide, not data: a direction that the data never take counts as much
    as any. In small or depth-wise nets there is little to gain.

    Args:
        epochs: further epochs afterwards, on all training data.
        learning_rate: peak learning rate; about a third of the first training's.
        rank_rule: "budget" (the ranks that keep most within `macs_ratio`), "energy" (the
            cheapest that keep `least_energy`) or "vbmf" (no less than variational Bayes finds
            above the noise, Nakajima et al., JMLR 14, 2013).
        macs_ratio: multiply-adds of the layers that can be factorised, afterwards over before,
            in (0, 1); for the rule "budget".
        least_energy: share of a layer's squared weights that its ranks must keep, in [0, 1); it
            goes before `macs_ratio`.
        round_to: ranks are multiples of this, which kernels are fast for, or full.
        keep_first: leave layers that see the image itself whole.
        keep_last: leave layers that give the logits whole.
    """

    stage: ClassVar[Stage] = "structure"

    epochs: int
    learning_rate: float
    rank_rule: str = "budget"
    macs_ratio: float = 0.5
    least_energy: float = 0.0
    round_to: int = 8
    keep_first: bool = True
    keep_last: bool = True

    def __post_init__(self) -> None:
        rules = ", ".join(RANK_RULES)
        is_bounded = self.rank_rule != "energy" or self.least_energy > 0
        check_options(
            [
                *training_rules(self.epochs, self.learning_rate),
                ("rank_rule", self.rank_rule, self.rank_rule in RANK_RULES, f"one of {rules}"),
                ("macs_ratio", self.macs_ratio, 0 < self.macs_ratio < 1, "in (0, 1)"),
                ("least_energy", self.least_energy, 0 <= self.least_energy < 1, "in [0, 1)"),
                ("least_energy", self.least_energy, is_bounded, "above 0, for rank_rule=energy"),
                ("round_to", self.round_to, self.round_to >= 1, "a whole number from 1 up"),
            ]
        )

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the factorised, trained net and its ranks; `net` stays as it is.

        Raises:
            MedliteError: not one layer could be factorised.
        """
        thin = evaluation_copy(net)
        survey = survey_layers(
            thin, context.spec.input_shape, keep_first=self.keep_first, keep_last=self.keep_last
        )
        plan = self._plan(thin, survey)
        if not plan.ranks:
            message = (
                f"nothing could be factorised in {type(net).__name__}: of its convolutions and "
                f"linear layers {_left_alone(survey, plan)}; lower macs_ratio or least_energy, "
                "or leave this step out"
            )
            if context.is_dry:  # trained weights may have a lower rank than fresh ones
                context.report("low rank", message)
                return thin, {"ranks": {}}
            raise MedliteError(message)
        for name, ranks in plan.ranks.items():
            layer = cast("Factorable", thin.get_submodule(name))
            replace_layer(thin, name, factorised(layer, factors(layer, ranks)))
        context.report("low rank", f"{self._describe(plan)}; {_describe_sizes(net, thin)}")
        context.report("not factorised", _left_alone(survey, plan) or "nothing")
        trained = context.fit(
            thin, name="low_rank", epochs=self.epochs, learning_rate=self.learning_rate
        )
        return trained, {"ranks": {name: list(ranks) for name, ranks in plan.ranks.items()}}

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Give a copy of `net` the factorised layers; their weights are still to be loaded."""
        thin = evaluation_copy(net)
        for name, ranks in state["ranks"].items():
            layer = cast("Factorable", thin.get_submodule(name))
            shapes = factor_shapes(layer, tuple(ranks))
            weights = [layer.weight.detach().new_zeros(shape) for shape in shapes]
            replace_layer(thin, name, factorised(layer, weights))
        return thin

    def _plan(self, net: nn.Module, survey: Survey) -> _Plan:
        """Which form every free layer gets."""
        names, allowed = [], []
        for name, at in survey.positions.items():
            layer = cast("Factorable", net.get_submodule(name))
            some = rank_choices(layer, at, round_to=self.round_to)
            if some.whole > 0:
                names.append(name)
                by_noise = self.rank_rule == "vbmf"
                least = tuple(map(variational_rank, unfoldings(layer))) if by_noise else ()
                allowed.append(some.at_least(self.least_energy, least))
        if self.rank_rule == "budget":
            total = sum(int(some.macs[-1]) for some in allowed)
            chosen = choose_within(allowed, self.macs_ratio * total)
        else:
            chosen = [some.cheapest() for some in allowed]
        return _Plan(names, allowed, chosen)

    def _describe(self, plan: _Plan) -> str:
        before, after = plan.macs
        wanted = f", macs_ratio {self.macs_ratio}" if self.rank_rule == "budget" else ""
        if self.rank_rule == "budget" and after > self.macs_ratio * before:
            wanted += ", which ranks from 8 up and least_energy put out of reach"
        energies = plan.energies
        return (
            f"{len(plan.ranks)} of {len(plan.names)} layers that can save multiply-adds (rule "
            f"{self.rank_rule}{wanted}): in these layers from {before / 1e6:,.1f} to "
            f"{after / 1e6:,.1f} million multiply-adds an image ({after / before:.2f}); ranks "
            f"{_describe_ranks(plan.ranks)}; energy kept from {min(energies):.2f} to "
            f"{max(energies):.2f} before training on"
        )


@dataclass(frozen=True)
class _Plan:
    """The layers that can save multiply-adds, their forms, and which form each gets."""

    names: list[str]
    forms: list[RankChoices]
    chosen: list[int]

    @property
    def ranks(self) -> dict[str, Ranks]:
        """Of the layers that are factorised."""
        return {name: tuple(form.ranks[index].tolist()) for name, form, index in self._cut}

    @property
    def energies(self) -> list[float]:
        """The share of the squared weights that each factorised layer keeps, at the least."""
        return [float(form.energy[index]) for _, form, index in self._cut]

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-adds an image of all these layers, before and after."""
        before = sum(int(form.macs[-1]) for form in self.forms)
        chosen = zip(self.forms, self.chosen, strict=True)
        return before, sum(int(form.macs[index]) for form, index in chosen)

    @property
    def _cut(self) -> list[tuple[str, RankChoices, int]]:
        plans = zip(self.names, self.forms, self.chosen, strict=True)
        return [plan for plan in plans if plan[2] != plan[1].whole]


def _left_alone(survey: Survey, plan: _Plan) -> str:
    """The layers that stay whole, by reason, such as "first: stem; grouped: 12 layers"."""
    reasons = dict(survey.left_alone)
    for name in survey.positions:
        if name not in plan.names:
            reasons[name] = "no rank saves multiply-adds"
        elif name not in plan.ranks:
            reasons[name] = "would lose too much for what it saves"
    names = defaultdict(list)
    for name, reason in reasons.items():
        names[reason].append(name)
    return "; ".join(f"{reason}: {_in_short(some)}" for reason, some in names.items())


def _in_short(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= MOST_NAMES else f"{len(names)} layers"


def _describe_ranks(ranks: dict[str, Ranks]) -> str:
    texts = [f"{name} {'x'.join(map(str, some))}" for name, some in ranks.items()]
    more = len(texts) - MOST_NAMES
    return ", ".join(texts[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _describe_sizes(before: nn.Module, after: nn.Module) -> str:
    sizes = (sum(parameter.numel() for parameter in net.parameters()) for net in (before, after))
    return "from {:,} to {:,} parameters in the whole net".format(*sizes)
