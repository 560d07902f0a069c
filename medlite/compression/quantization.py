"""Quantisation: after training from a few images, or with further training under rounding.

Both give the same kind of graph. With 8 or 7 bits: convolutions and linear layers in integers
(uint8 activations, one scale a tensor; int8 weights, one scale a channel), all else in float.
With fewer bits: weights in integers, and all arithmetic in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import nn
from torch.fx import GraphModule

from medlite.compression.checks import check_options, training_rules
from medlite.compression.fake_quantize import set_mode
from medlite.compression.order import Stage
from medlite.compression.quantization_report import report_quantization
from medlite.compression.quantized_graph import (
    PASSES,
    activation_ranges,
    calibrate,
    convert,
    load_activation_ranges,
    prepare,
    set_training,
)
from medlite.compression.quantizer import INTEGER_ARITHMETIC_BITS, Int8Quantizer
from medlite.types import CompressionContext, DataSpec, FitHooks

CALIBRATION_BATCH_SIZE = 16
WEIGHT_BITS = (*INTEGER_ARITHMETIC_BITS, 4, 3, 2)


@dataclass(frozen=True, kw_only=True)
class PostTrainingQuantization:
    """Static quantisation with ranges from training images; no weight is trained.

    Nagel et al., "A White Paper on Neural Network Quantization", arXiv:2106.08295, section 3;
    percentiles: Wu et al., "Integer Quantization for Deep Learning Inference: Principles and
    Empirical Evaluation", arXiv:2004.09602, section 3.2, here each end of the range by itself.
    Batch normalisation is folded into convolutions first. A net that has a `deploy()`
    (re-parameterisable blocks) is quantised in its deployed form.

    Args:
        calibration_samples: training images that set the ranges of activations; where weights
            alone are rounded there are none to set, and this and the next two have nothing to say.
        method: "minmax" takes the whole range that was seen; "mse" shrinks it to where the
            squared rounding error is least, which outliers cannot spoil; "percentile" cuts off
            both ends.
        percentile: of the values of an activation, where "percentile" cuts the upper end; the
            lower one is cut at 100 - `percentile`.
        weight_bits: 7: weights in [-63, 63], which x86 processors without VNNI multiply in 8-bit
            kernels without cutting off sums; 8: twice as fine, for processors known to have VNNI,
            and for ARM; or 4, 3 or 2 (ternary: -1, 0, 1) for weights alone, with activations and
            arithmetic in float: smaller files, not faster ones.
        per_channel: a scale for each output channel of a weight; false: one for the whole
            weight, for targets whose kernels know no other.
        keep_first_float: leave layers that see the image itself in float.
        keep_last_float: leave layers that give the logits in float.
        keep_float: names of further layers or blocks to leave in float; "head" means every
            layer with a component "head" in its path.
    """

    stage: ClassVar[Stage] = "numeric"

    calibration_samples: int = 256
    method: str = "mse"
    percentile: float = 99.99
    weight_bits: int = 7
    per_channel: bool = True
    keep_first_float: bool = True
    keep_last_float: bool = True
    keep_float: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_options(_rules(self))

    @property
    def refused_formats(self) -> dict[str, str]:
        """Formats of artifacts that cannot hold it, and what to do about that."""
        return _refused_formats(self.weight_bits)

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the integer graph and its ranges; `net` stays as it is."""
        quantizer = _quantizer(self)
        prepared = prepare(net, context.spec.input_shape, quantizer)
        how = "after training"
        if not quantizer.is_weight_only:
            num_images = min(self.calibration_samples, context.spec.num_samples["train"])
            how += f", ranges ({self.method}) from {num_images} training images"
        report_quantization(prepared, quantizer, context.report, how)
        if context.is_dry:
            return prepared, {}
        _calibrate(self, prepared, quantizer, context)
        return convert(prepared, context.spec.input_shape), {"ranges": activation_ranges(prepared)}

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Rebuild the integer graph around `net`; its weights are still to be loaded."""
        return _restore(net, state, spec, _quantizer(self))


@dataclass(frozen=True, kw_only=True)
class QuantizationAwareTraining:
    """Trains on under 8-bit rounding, then quantises: Jacob et al., arXiv:1712.05877, section 3.

    It starts from post-training quantisation. Unlike the paper's, batch normalisation is folded
    before this training and not during it: its statistics stay those of the float training. In
    return the net that is trained is, to the last bit, the net that is exported. Ranges are
    learnt from training batches only, and not after `freeze_observers_at`.

    Args:
        epochs: further epochs, on all training data.
        learning_rate: peak learning rate; about a tenth of the first training's.
        calibration_samples: training images that set the first ranges of activations.
        method: how they set them; see `PostTrainingQuantization`, as the next three.
        percentile: where "percentile" cuts.
        weight_bits: 8, 7, 4, 3 or 2.
        per_channel: a scale for each output channel of a weight.
        freeze_observers_at: share of the epochs after which the ranges of activations stay fixed.
        keep_first_float: see `PostTrainingQuantization`, as the next two.
        keep_last_float: leave layers that give the logits in float.
        keep_float: names of further layers or blocks to leave in float.
    """

    stage: ClassVar[Stage] = "numeric"

    epochs: int
    learning_rate: float
    calibration_samples: int = 256
    method: str = "mse"
    percentile: float = 99.99
    weight_bits: int = 7
    per_channel: bool = True
    freeze_observers_at: float = 0.5
    keep_first_float: bool = True
    keep_last_float: bool = True
    keep_float: Sequence[str] = ()

    def __post_init__(self) -> None:
        freezes = 0 <= self.freeze_observers_at <= 1
        check_options(
            [
                *training_rules(self.epochs, self.learning_rate),
                *_rules(self),
                ("freeze_observers_at", self.freeze_observers_at, freezes, "in [0, 1]"),
            ]
        )

    @property
    def refused_formats(self) -> dict[str, str]:
        """Formats of artifacts that cannot hold it, and what to do about that."""
        return _refused_formats(self.weight_bits)

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the integer graph and its ranges; `net` stays as it is."""
        quantizer = _quantizer(self)
        prepared = prepare(net, context.spec.input_shape, quantizer)
        how = f"{self.epochs} epochs of quantisation-aware training"
        report_quantization(prepared, quantizer, context.report, how)
        if context.is_dry:
            return prepared, {}
        _calibrate(self, prepared, quantizer, context)
        ranges = RangeSchedule(freeze_at=self.freeze_observers_at)
        trained = context.fit(
            prepared,
            name="qat",
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            hooks=FitHooks(set_mode=ranges.set_mode, on_epoch_start=ranges.on_epoch_start),
        )
        return convert(trained, context.spec.input_shape), {"ranges": activation_ranges(trained)}

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Rebuild the integer graph around `net`; its weights are still to be loaded."""
        return _restore(net, state, spec, _quantizer(self))


@dataclass
class RangeSchedule:
    """Lets the ranges of a prepared net follow training batches, up to a share of the epochs.

    Args:
        freeze_at: the share from which they stay fixed.
    """

    freeze_at: float
    is_training: bool = field(default=False, init=False)
    is_frozen: bool = field(default=False, init=False)

    def set_mode(self, net: nn.Module, is_training: bool) -> None:
        """Switch dropouts and ranges: outside of training nothing is learnt from a batch."""
        self.is_training = is_training
        set_training(cast("GraphModule", net), is_training=is_training)
        set_mode(net, "train" if is_training and not self.is_frozen else "apply")

    def on_epoch_start(self, net: nn.Module, done: float) -> None:
        """Freeze the ranges when their share of the epochs is done."""
        self.is_frozen = done >= self.freeze_at
        self.set_mode(net, self.is_training)


def _quantizer(step: PostTrainingQuantization | QuantizationAwareTraining) -> Int8Quantizer:
    return Int8Quantizer(
        keep_first_float=step.keep_first_float,
        keep_last_float=step.keep_last_float,
        keep_float=step.keep_float,
        weight_bits=step.weight_bits,
        per_channel=step.per_channel,
    )


def _rules(
    step: PostTrainingQuantization | QuantizationAwareTraining,
) -> list[tuple[str, Any, bool, str]]:
    samples, percentile, bits = step.calibration_samples, step.percentile, step.weight_bits
    known_bits = ", ".join(map(str, WEIGHT_BITS))
    return [
        ("calibration_samples", samples, samples >= 1, "a whole number from 1 up"),
        ("method", step.method, step.method in PASSES, f"one of {', '.join(PASSES)}"),
        ("percentile", percentile, 50 < percentile < 100, "in (50, 100)"),
        ("weight_bits", bits, bits in WEIGHT_BITS, f"one of {known_bits}"),
    ]


def _refused_formats(weight_bits: int) -> dict[str, str]:
    if weight_bits in INTEGER_ARITHMETIC_BITS:
        return {}
    remedy = "set weight_bits=8, or take runtime=onnxruntime or runtime=openvino"
    return {"executorch": f"ExecuTorch holds no weights of {weight_bits} bits alone; {remedy}"}


def _calibrate(
    step: PostTrainingQuantization | QuantizationAwareTraining,
    prepared: GraphModule,
    quantizer: Int8Quantizer,
    context: CompressionContext,
) -> None:
    if quantizer.is_weight_only:
        set_training(prepared, is_training=False)
        set_mode(prepared, "apply")
        return
    calibrate(
        prepared,
        context.calibration_images(step.calibration_samples),
        batch_size=CALIBRATION_BATCH_SIZE,
        method=step.method,
        percentile=step.percentile,
    )


def _restore(
    net: nn.Module, state: dict[str, Any], spec: DataSpec, quantizer: Int8Quantizer
) -> nn.Module:
    prepared = prepare(net, spec.input_shape, quantizer)
    load_activation_ranges(prepared, state["ranges"])
    return convert(prepared, spec.input_shape)
