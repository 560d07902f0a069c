"""Sparsity: single weights become zero, and the net keeps its shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medlite.compression.channel_importance import accumulate_gradients
from medlite.compression.checks import check_options, training_rules
from medlite.compression.copies import evaluation_copy
from medlite.compression.order import Stage
from medlite.compression.sparse_layers import SparseLayer, find_ends, find_layers
from medlite.compression.sparsity_report import count_zeros, describe_practice, describe_zeros
from medlite.compression.weight_masks import (
    change_masks,
    cubic_ramp,
    hold_masks,
    load_held,
    mask_of_blocks,
    masks_of_all,
    masks_of_each,
    set_to_zero,
    stored_weights,
)
from medlite.errors import MedliteError
from medlite.types import CompressionContext, DataSpec, FitHooks

UNSTRUCTURED = "unstructured"
_TOLERANCE = 0.005
_PATTERNS = "unstructured or N:M with 0 < N < M, such as '2:4' (a yaml needs the quotes)"


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Sets the least weights of linear and convolutional layers to zero, and trains the others.

    Han et al., "Learning both Weights and Connections", arXiv:1506.02626, in one shot, or by the
    schedule of Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878. Biases, norms and
    whatever else is not the weight of such a layer (rates of scans, embeddings, the joint
    projection of `nn.MultiheadAttention`) stay. A file of zeros is as large as before, and a
    runtime for dense weights as slow; the card says what was measured. No step that trains or
    changes layers may follow: it would fill the zeros again. So may the re-parameterisation of
    branches, with which nets that have some are deployed; the card counts both.

    In the gradual schedule validation always judges the net at its final sparsity, since the
    best epoch is what a fit returns; averaging of weights (`train.ema_decay`) is off in it.

    Args:
        epochs: epochs of training with zeros.
        learning_rate: peak learning rate; about a third of the first training's.
        sparsity: share of the weights of the chosen layers that become zero, in (0, 1).
        pattern: "unstructured", or "N:M" as in Mishra et al., arXiv:2104.08378: of M consecutive
            input channels of an output at most N have a weight that is not zero. Layers whose
            input channels (in a group) M does not divide are left alone, depth-wise ones too.
        scope: of "unstructured": "global" takes the least weights of all layers together,
            "layer" the same share of each.
        schedule: "one_shot" before the training, or "gradual" in its course.
        criterion: what is least: "magnitude" |w|, or "taylor" |w g| with the gradient g of the
            loss (Molchanov et al., arXiv:1906.10771), of "one_shot" only.
        criterion_batches: training batches behind "taylor".
        ramp_until: share of the epochs after which a gradual schedule is at its end.
        keep_first: leave layers that see the image itself alone.
        keep_last: leave layers that give the logits alone.
    """

    stage: ClassVar[Stage] = "train"
    leaves_zeros: ClassVar[bool] = True

    epochs: int
    learning_rate: float
    sparsity: float = 0.5
    pattern: str = UNSTRUCTURED
    scope: str = "global"
    schedule: str = "one_shot"
    criterion: str = "magnitude"
    criterion_batches: int = 8
    ramp_until: float = 0.5
    keep_first: bool = True
    keep_last: bool = True

    def __post_init__(self) -> None:
        check_options(
            [
                *training_rules(self.epochs, self.learning_rate),
                *self._pattern_rules(),
                ("scope", self.scope, self.scope in ("global", "layer"), "global or layer"),
                (
                    "schedule",
                    self.schedule,
                    self.schedule in ("one_shot", "gradual"),
                    "one_shot or gradual",
                ),
                (
                    "criterion",
                    self.criterion,
                    self.criterion == "magnitude"
                    or (self.criterion == "taylor" and self.schedule != "gradual"),
                    "magnitude, or taylor with schedule=one_shot",
                ),
                (
                    "criterion_batches",
                    self.criterion_batches,
                    self.criterion_batches >= 1,
                    "a whole number from 1 up",
                ),
                ("ramp_until", self.ramp_until, 0 < self.ramp_until <= 1, "in (0, 1]"),
            ]
        )

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the trained net with zeros in its weights; `net` stays as it is.

        Raises:
            MedliteError: not one weight could become zero.
        """
        layers, left = self._choose_layers(net, context.spec)
        scores = self._scores(net, layers, context)
        masks = self.masks_at(1.0, scores, layers)
        if all(mask.all() for mask in masks.values()):
            message = (
                f"nothing could become zero in {type(net).__name__}: its {len(layers)} layers are "
                f"too small for sparsity {self.sparsity}; raise sparsity"
            )
            raise MedliteError(message)
        ramp = MaskRamp(step=self, layers=layers)
        is_gradual = self.schedule == "gradual"
        held = evaluation_copy(net)
        hold_masks(held, layers, masks)
        trained = context.fit(
            held,
            name="sparsify",
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            hooks=ramp.hooks() if is_gradual else FitHooks(),
        )
        if is_gradual:
            ramp.set_mode(trained, is_training=False)
        sparse = evaluation_copy(net)
        load_held(sparse, trained, layers)
        self._report(net, sparse, layers, left, context)
        return sparse, {}

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Return `net`: the zeros are in the weights that are still to be loaded."""
        return net

    def masks_at(
        self, progress: float, scores: Mapping[str, Tensor], layers: Mapping[str, SparseLayer]
    ) -> dict[str, Tensor]:
        """True for the weights that stay, at a point of the schedule from 0 to its end at 1.

        Args:
            progress: the point.
            scores: of each weight, by layer; the lowest go.
            layers: as `find_layers` gives them.
        """
        share = cubic_ramp(progress)
        blocks = _parse(self.pattern)
        if blocks is None:
            choose = masks_of_all if self.scope == "global" else masks_of_each
            return choose(scores, share * self.sparsity)
        num_kept, size = blocks
        num_kept = size - round(share * (size - num_kept))
        return {
            name: mask_of_blocks(
                score, num_kept=num_kept, block_size=size, axis=layers[name].input_axis
            )
            for name, score in scores.items()
        }

    def _pattern_rules(self) -> list[tuple[str, Any, bool, str]]:
        blocks = _parse(self.pattern)
        is_right = self.pattern == UNSTRUCTURED or blocks is not None
        rules = [
            ("pattern", self.pattern, is_right, _PATTERNS),
            ("sparsity", self.sparsity, 0 < self.sparsity < 1, "in (0, 1)"),
        ]
        if blocks is None:
            return rules
        share = 1 - blocks[0] / blocks[1]
        fits = abs(self.sparsity - share) < _TOLERANCE
        what = f"{share:.3g}, the share of zeros in pattern {self.pattern}"
        return [*rules, ("sparsity", self.sparsity, fits, what)]

    def _choose_layers(
        self, net: nn.Module, spec: DataSpec
    ) -> tuple[dict[str, SparseLayer], dict[str, str]]:
        """The layers that get zeros, and why each of the others gets none."""
        layers = find_layers(net)
        left: dict[str, str] = {}
        blocks = _parse(self.pattern)
        if blocks is not None:
            why = f"input channels not divisible by {blocks[1]}"
            left |= {name: why for name, layer in layers.items() if layer.num_inputs % blocks[1]}
        if layers and (self.keep_first or self.keep_last):
            first, last = find_ends(net, layers, spec.input_shape)
            left |= dict.fromkeys(sorted(last), "gives the logits") if self.keep_last else {}
            left |= dict.fromkeys(sorted(first), "sees the image") if self.keep_first else {}
        chosen = {name: layer for name, layer in layers.items() if name not in left}
        if not chosen:
            message = (
                f"nothing could become zero in {type(net).__name__}: none of its {len(layers)} "
                "linear and convolutional layers may change"
                + "".join(f"; {line}" for line in _grouped(left))
                + "; see keep_first, keep_last and pattern"
            )
            raise MedliteError(message)
        return chosen, left

    def _scores(
        self, net: nn.Module, layers: Mapping[str, SparseLayer], context: CompressionContext
    ) -> dict[str, Tensor]:
        scored = evaluation_copy(net)
        weights = {name: scored.get_submodule(name).get_parameter("weight") for name in layers}
        if self.criterion == "magnitude":
            return _magnitudes(weights)
        scored.requires_grad_(True).zero_grad()
        batches = context.calibration_batches(self.criterion_batches)
        accumulate_gradients(scored, batches, context.spec)
        return {
            name: (weight.detach() * weight.grad).abs()
            for name, weight in weights.items()
            if weight.grad is not None
        }

    def _report(
        self,
        net: nn.Module,
        sparse: nn.Module,
        layers: Mapping[str, SparseLayer],
        left: Mapping[str, str],
        context: CompressionContext,
    ) -> None:
        scope = f", {self.scope}" if self.pattern == UNSTRUCTURED else ""
        how = f"{self.pattern}{scope}, by {self.criterion}, {self.schedule.replace('_', ' ')}"
        zeros = count_zeros(sparse, layers)
        context.report("sparsity", f"{how}: {describe_zeros(sparse, zeros)}")
        context.report(
            "zeros by layer", ", ".join(f"{k} {z / n:.1%}" for k, (z, n) in zeros.items())
        )
        context.report("left without zeros", "; ".join(_grouped(left)) or "no such layer")
        context.report("sparsity in practice", describe_practice(net, sparse, self.pattern))


class _Clock(nn.Module):
    """The share of the epochs that was done when the latest one began, for checkpoints to hold."""

    done: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros(()))


@dataclass
class MaskRamp:
    """The gradual schedule of a step: masks by magnitude, anew in every epoch.

    Every epoch has the sparsity that is due at its end, so that none is spent without zeros, and
    the last one the sparsity that is judged. A budget of time may leave fewer epochs than the step
    has, so the length of one is what was done since the epoch before; only the first has to be
    taken for one of the step's own. The masks follow from the stored weights and these shares
    alone, which checkpoints hold: a resumed fit makes the same.

    Args:
        step: whose options hold.
        layers: that hold masks.
    """

    step: Sparsity
    layers: Mapping[str, SparseLayer]
    progress: float = field(init=False)
    clock: _Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = _Clock()
        self.progress = self._progress(0.0)

    def hooks(self) -> FitHooks:
        """What a fit needs to follow the schedule."""
        return FitHooks(
            auxiliary=self.clock, set_mode=self.set_mode, on_epoch_start=self.on_epoch_start
        )

    def set_mode(self, net: nn.Module, is_training: bool) -> None:
        """Switch the net, in evaluation to its final sparsity."""
        net.train(is_training)
        self._change_masks(net, self.progress if is_training else 1.0)

    def on_epoch_start(self, net: nn.Module, done: float) -> None:
        """Go on in the schedule."""
        self.progress = self._progress(done)
        self.clock.done.fill_(done)
        self._change_masks(net, self.progress)

    def _progress(self, done: float) -> float:
        length = max(done - float(self.clock.done), 1 / self.step.epochs)
        return min(1.0, (done + length) / self.step.ramp_until)

    def _change_masks(self, net: nn.Module, progress: float) -> None:
        scores = _magnitudes(stored_weights(net, self.layers))
        change_masks(net, self.layers, self.step.masks_at(progress, scores, self.layers))


def prune_by_magnitude(net: nn.Module, sparsity: float) -> nn.Module:
    """A copy of `net` whose least weights are zero: one shot, all layers together, no training.

    The protocol of Holste et al., "How Does Pruning Impact Long-Tailed Multi-Label Medical Image
    Classifiers?" (MICCAI 2023, arXiv:2308.09180): L1 magnitude over the weights of all
    convolutional and linear layers, the first and the last included. They prune 2-D
    convolutions; here those of any dimensions count.

    Args:
        net: trained; it stays as it is.
        sparsity: share of these weights that become zero, in [0, 1).

    Raises:
        ConfigError: the share is out of its range.
        MedliteError: the net has no such layer.
    """
    check_options([("sparsity", sparsity, 0 <= sparsity < 1, "in [0, 1)")])
    sparse = evaluation_copy(net)
    layers = find_layers(sparse)
    if not layers:
        message = f"{type(net).__name__} has no linear or convolutional layer to prune"
        raise MedliteError(message)
    weights = {name: sparse.get_submodule(name).get_parameter("weight") for name in layers}
    set_to_zero(weights, masks_of_all(_magnitudes(weights), sparsity))
    return sparse


def _magnitudes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().abs() for name, weight in weights.items()}


def _parse(pattern: str) -> tuple[int, int] | None:
    """(N, M) of "N:M", None for everything else.

    >>> _parse("2:4"), _parse("4:2"), _parse("unstructured")
    ((2, 4), None, None)
    """
    match = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    if match is None or not 0 < int(match[1]) < int(match[2]):
        return None
    return int(match[1]), int(match[2])


def _grouped(reasons: Mapping[str, str]) -> list[str]:
    """One line for each reason.

    >>> _grouped({"stem": "sees the image", "a": "too small", "b": "too small"})
    ['sees the image: stem', 'too small: a, b']
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{reason}: {', '.join(group)}" for reason, group in names.items()]
