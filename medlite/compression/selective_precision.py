"""INT8 after training, with the fewest layers in float that a clinical objective asks for."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.conv import _ConvNd

from medlite.compression.checks import check_options
from medlite.compression.clinical_objective import OBJECTIVES, ClinicalObjective, Score, noise_ratio
from medlite.compression.layer_switches import LayerSwitches
from medlite.compression.order import Stage
from medlite.compression.precision_search import (
    LayerSensitivity,
    counts_to_verify,
    most_sensitive_first,
)
from medlite.compression.quantization import CALIBRATION_BATCH_SIZE
from medlite.compression.quantization_report import width_of_weights
from medlite.compression.quantized_graph import (
    PASSES,
    activation_ranges,
    calibrate,
    convert,
    kept_in_words,
    load_activation_ranges,
    prepare,
)
from medlite.compression.quantizer import INTEGER_ARITHMETIC_BITS, Int8Quantizer
from medlite.types import CompressionContext, DataSpec

ORDERS = ("noise", "objective")
NUM_REPORTED = 10


@dataclass(frozen=True, kw_only=True)
class SelectivePrecision:
    """Post-training quantisation that finds by itself which layers must stay in float.

    Pandey et al., "A Practical Mixed Precision Algorithm for Post-Training Quantization",
    arXiv:2302.05397: each layer is rounded alone, the power of the error that this makes in the
    logits orders the layers, and bisection along that order finds how many must keep the higher
    precision. To quantise one layer at a time is also how Nagel et al., arXiv:2106.08295, look
    for what spoils a net. Different from Pandey et al.: the higher precision is float, the images
    are of the validation split (a choice made on it, so the test split says what it is worth),
    the target is a clinical objective, and it is verified on the converted net, to which further
    layers are added while it fails. What no order can show is a smaller set out of order.

    The first and the last layer are searched like all others.

    Args:
        objective: "metric" (mean Dice, macro AUC), "worst_sensitivity" (of any class), "ece" or
            "nll"; see `ClinicalObjective`.
        margin: how much worse than the float net it may be, absolute.
        max_float_layers: the most layers to keep in float beside `keep_float`. Where they do not
            suffice, the best that was found is deployed, and the report says so.
        order_by: "noise" as in the paper; "objective" orders by the loss of the objective itself,
            which needs many images: on few of them most layers lose nothing or one decision.
        validation_batches: what the objective is measured on.
        calibration_samples: training images that set the ranges of activations.
        method: how they set them; see `PostTrainingQuantization` ("percentile" cuts at 99.99).
        weight_bits: 8 or 7, see `PostTrainingQuantization`.
        keep_float: names of layers or blocks that stay in float in any case.
    """

    stage: ClassVar[Stage] = "numeric"

    objective: str = "metric"
    margin: float = 0.01
    max_float_layers: int = 8
    order_by: str = "noise"
    validation_batches: int = 16
    calibration_samples: int = 256
    method: str = "mse"
    weight_bits: int = 7
    keep_float: Sequence[str] = ()

    def __post_init__(self) -> None:
        least_one = "a whole number from 1 up"
        samples, batches = self.calibration_samples, self.validation_batches
        most = self.max_float_layers
        check_options(
            [
                _one_of("objective", self.objective, OBJECTIVES),
                ("margin", self.margin, self.margin >= 0, "0 or more"),
                ("max_float_layers", most, most >= 0, "a whole number from 0 up"),
                _one_of("order_by", self.order_by, ORDERS),
                ("validation_batches", batches, batches >= 1, least_one),
                ("calibration_samples", samples, samples >= 1, least_one),
                _one_of("method", self.method, tuple(PASSES)),
                _one_of("weight_bits", self.weight_bits, INTEGER_ARITHMETIC_BITS),
            ]
        )

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the graph of mixed precision, its ranges and layers; `net` stays as it is."""
        switches = LayerSwitches(net, context.spec.input_shape, self._quantizer)
        if context.is_dry:
            self._report_plan(switches, context)
            return switches.prepared, {}
        images = context.calibration_images(self.calibration_samples)
        self._calibrate(switches.prepared, images)
        objective = ClinicalObjective(
            kind=self.objective,
            spec=context.spec,
            batches=context.validation_batches(self.validation_batches),
        )
        trial = _Trial(switches=switches, objective=objective, order_by=self.order_by)
        chosen = self._choose(trial, net, images)
        self._report(trial, chosen, images, context)
        state = {"ranges": chosen.ranges, "float_layers": list(chosen.float_layers)}
        return chosen.net, state

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Rebuild the graph around `net`; its weights are still to be loaded."""
        prepared = prepare(net, spec.input_shape, self._quantizer(state["float_layers"]))
        load_activation_ranges(prepared, state["ranges"])
        return convert(prepared, spec.input_shape)

    def num_trials(self, net: nn.Module) -> int:
        """How often the validation batches go through a net, at most: once a layer, and to choose.

        Args:
            net: with layers that are called once; in a re-parameterisable net all branches count.
        """
        layers = sum(isinstance(part, nn.Linear | _ConvNd) for part in net.modules())
        return layers + 2 * (self.max_float_layers + 1)

    def _quantizer(self, float_layers: Collection[str]) -> Int8Quantizer:
        return Int8Quantizer(
            keep_first_float=False,
            keep_last_float=False,
            keep_float=self.keep_float,
            keep_layers=float_layers,
            weight_bits=self.weight_bits,
        )

    def _calibrate(self, prepared: GraphModule, images: Tensor) -> None:
        calibrate(prepared, images, batch_size=CALIBRATION_BATCH_SIZE, method=self.method)

    def _choose(self, trial: _Trial, net: nn.Module, images: Tensor) -> _Converted:
        """The first converted net within the margin, or the best of those that were verified."""
        bound = min(self.max_float_layers, len(trial.ordered) - 1)
        best: _Converted | None = None
        for count in counts_to_verify(trial.loss_of, bound=bound, margin=self.margin):
            converted = self._converted(trial, net, images, count)
            if best is None or converted.loss < best.loss:
                best = converted
            if best.loss <= self.margin:
                break
        assert best is not None
        return best

    def _converted(self, trial: _Trial, net: nn.Module, images: Tensor, count: int) -> _Converted:
        float_layers = tuple(layer.name for layer in trial.ordered[:count])
        shape = trial.objective.spec.input_shape
        prepared = prepare(net, shape, self._quantizer(float_layers))
        self._calibrate(prepared, images)
        converted = convert(prepared, shape)
        score = trial.objective.score(trial.objective.logits(converted))
        return _Converted(
            net=converted,
            ranges=activation_ranges(prepared),
            float_layers=float_layers,
            score=score,
            loss=trial.objective.loss(score, trial.float_score),
        )

    def _report_plan(self, switches: LayerSwitches, context: CompressionContext) -> None:
        most = min(self.max_float_layers, len(switches.layers) - 1)
        context.report(
            "selective precision",
            f"each of {len(switches.layers)} layers will be rounded alone; then the fewest, at "
            f"most {most}, stay in float so that objective={self.objective} loses at most "
            f"{self.margin:g} on validation images",
        )
        context.report("kept in float", _kept(switches, ()))

    def _report(
        self, trial: _Trial, chosen: _Converted, images: Tensor, context: CompressionContext
    ) -> None:
        switches, name = trial.switches, trial.objective.name
        num_layers = len(switches.layers) + len(switches.float_layers)
        context.report(
            "quantisation",
            f"INT8 in {len(switches.layers) - len(chosen.float_layers)} of {num_layers} weighted "
            f"layers, int8 weights {width_of_weights(self._quantizer(()))}after training, ranges "
            f"({self.method}) from {len(images)} training images",
        )
        context.report("kept in float", _kept(switches, chosen.float_layers))
        context.report(
            "selective precision",
            f"{name} on {trial.objective.num_images} validation images: float "
            f"{trial.float_score.value:.4f}, all {len(switches.layers)} layers in INT8 "
            f"{trial.score_of(0).value:.4f}, deployed {chosen.score.value:.4f} with "
            f"{len(chosen.float_layers)} of them in float; {self._outcome(chosen, name)}",
        )
        losses = trial.objective.losses(chosen.score, trial.float_score)
        for name in list(losses)[:1]:
            before, after = (
                score.sensitivities[name] for score in (trial.float_score, chosen.score)
            )
            context.report(
                "class that lost most", f"{name}: sensitivity {before:.4f} to {after:.4f}"
            )
        most = trial.ordered[:NUM_REPORTED]
        context.report(
            "most sensitive layers",
            f"rounded alone (noise in the logits, loss of {name}): "
            + "; ".join(
                f"{layer.name} {_decibels(layer.noise_ratio)}, {layer.loss:+.4f}" for layer in most
            ),
        )

    def _outcome(self, chosen: _Converted, name: str) -> str:
        if chosen.loss <= self.margin:
            return f"within the margin of {self.margin:g}"
        of = "of a class's sensitivity" if chosen.score.sensitivities else f"of {name}"
        return (
            f"THE MARGIN OF {self.margin:g} COULD NOT BE MET: with up to {self.max_float_layers} "
            f"layers in float the least loss {of} that was found is {chosen.loss:.4f}; raise "
            "max_float_layers or margin, or train under rounding (compression=qat)"
        )


@dataclass(frozen=True, kw_only=True)
class _Converted:
    net: nn.Module
    ranges: dict[str, Tensor]
    float_layers: tuple[str, ...]
    score: Score
    loss: float


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """What the objective says of sets of layers, on the one calibrated graph."""

    switches: LayerSwitches
    objective: ClinicalObjective
    order_by: str
    scores: dict[int, Score] = field(default_factory=dict)

    @cached_property
    def float_logits(self) -> Tensor:
        """Of the graph without any rounding."""
        return self._logits(())

    @cached_property
    def float_score(self) -> Score:
        return self.objective.score(self.float_logits)

    @cached_property
    def ordered(self) -> list[LayerSensitivity]:
        """All layers, the most sensitive one first."""
        layers = [self._sensitivity(name) for name in self.switches.layers]
        return most_sensitive_first(layers, order_by=self.order_by)

    def score_of(self, count: int) -> Score:
        """The objective with the `count` most sensitive layers in float."""
        if count not in self.scores:
            rounded = [layer.name for layer in self.ordered[count:]]
            self.scores[count] = self.objective.score(self._logits(rounded))
        return self.scores[count]

    def loss_of(self, count: int) -> float:
        return self.objective.loss(self.score_of(count), self.float_score)

    def _sensitivity(self, name: str) -> LayerSensitivity:
        logits = self._logits((name,))
        return LayerSensitivity(
            name=name,
            noise_ratio=noise_ratio(logits, self.float_logits),
            loss=self.objective.loss(self.objective.score(logits), self.float_score),
        )

    def _logits(self, rounded: Collection[str]) -> Tensor:
        with self.switches.rounding_only(rounded) as graph:
            return self.objective.logits(graph)


def _one_of(key: str, value: Any, options: Sequence[Any]) -> tuple[str, Any, bool, str]:
    return key, value, value in options, f"one of {', '.join(map(str, options))}"


def _kept(switches: LayerSwitches, found: Sequence[str]) -> str:
    names = [f"{name} (found by the search)" for name in found]
    return kept_in_words([*names, *switches.float_layers], switches.prepared)


def _decibels(ratio: float) -> str:
    return f"{10 * math.log10(ratio):.1f} dB" if 0 < ratio < math.inf else f"ratio {ratio}"
