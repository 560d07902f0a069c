"""INT8: after training from a few images, or with further training under rounding.

Both give the same kind of graph: convolutions and linear layers in 8-bit integers (uint8
activations, one scale a tensor; int8 weights, one scale a channel), everything else in float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import nn
from torch.fx import GraphModule

from medlite.compression.checks import check_options, training_rules
from medlite.compression.fake_quantize import set_mode
from medlite.compression.order import Stage
from medlite.compression.quantized_graph import (
    activation_ranges,
    calibrate,
    convert,
    count_scans,
    load_activation_ranges,
    prepare,
    set_training,
)
from medlite.compression.quantizer import Int8Quantizer
from medlite.types import CompressionContext, DataSpec, FitHooks

CALIBRATION_BATCH_SIZE = 16
METHODS = ("minmax", "mse")


@dataclass(frozen=True, kw_only=True)
class PostTrainingQuantization:
    """Static INT8 quantisation with ranges from training images; no weight is trained.

    Nagel et al., "A White Paper on Neural Network Quantization", arXiv:2106.08295, section 3.
    Batch normalisation is folded into convolutions first. A net that has a `deploy()`
    (re-parameterisable blocks) is quantised in its deployed form.

    Args:
        calibration_samples: training images that set the ranges of activations.
        method: "minmax" takes the whole range that was seen; "mse" shrinks it to where the
            squared rounding error is least, which outliers cannot spoil.
        keep_first_float: leave layers that see the image itself in float.
        keep_last_float: leave layers that give the logits in float.
        keep_float: names of further layers or blocks to leave in float; "head" means every
            layer with a component "head" in its path.
    """

    stage: ClassVar[Stage] = "numeric"

    calibration_samples: int = 256
    method: str = "mse"
    keep_first_float: bool = True
    keep_last_float: bool = True
    keep_float: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_options(_calibration_rules(self.calibration_samples, self.method))

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the INT8 graph and its ranges; `net` stays as it is."""
        quantizer = _quantizer(self)
        prepared = prepare(net, context.spec.input_shape, quantizer)
        images = context.calibration_images(self.calibration_samples)
        how = f"after training, ranges ({self.method}) from {len(images)} training images"
        _report(prepared, quantizer, context, how)
        if context.is_dry:
            return prepared, {}
        calibrate(prepared, images, batch_size=CALIBRATION_BATCH_SIZE, method=self.method)
        return convert(prepared, context.spec.input_shape), {"ranges": activation_ranges(prepared)}

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Rebuild the INT8 graph around `net`; its weights are still to be loaded."""
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
        method: how they set them, "minmax" or "mse"; see `PostTrainingQuantization`.
        freeze_observers_at: share of the epochs after which the ranges stay fixed.
        keep_first_float: see `PostTrainingQuantization`, as the next two.
        keep_last_float: leave layers that give the logits in float.
        keep_float: names of further layers or blocks to leave in float.
    """

    stage: ClassVar[Stage] = "numeric"

    epochs: int
    learning_rate: float
    calibration_samples: int = 256
    method: str = "mse"
    freeze_observers_at: float = 0.5
    keep_first_float: bool = True
    keep_last_float: bool = True
    keep_float: Sequence[str] = ()

    def __post_init__(self) -> None:
        freezes = 0 <= self.freeze_observers_at <= 1
        check_options(
            [
                *training_rules(self.epochs, self.learning_rate),
                *_calibration_rules(self.calibration_samples, self.method),
                ("freeze_observers_at", self.freeze_observers_at, freezes, "in [0, 1]"),
            ]
        )

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the INT8 graph and its ranges; `net` stays as it is."""
        quantizer = _quantizer(self)
        prepared = prepare(net, context.spec.input_shape, quantizer)
        _report(
            prepared, quantizer, context, f"{self.epochs} epochs of quantisation-aware training"
        )
        if context.is_dry:
            return prepared, {}
        images = context.calibration_images(self.calibration_samples)
        calibrate(prepared, images, batch_size=CALIBRATION_BATCH_SIZE, method=self.method)
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
        """Rebuild the INT8 graph around `net`; its weights are still to be loaded."""
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
    )


def _calibration_rules(samples: int, method: str) -> list[tuple[str, Any, bool, str]]:
    return [
        ("calibration_samples", samples, samples >= 1, "a whole number from 1 up"),
        ("method", method, method in METHODS, f"one of {', '.join(METHODS)}"),
    ]


def _restore(
    net: nn.Module, state: dict[str, Any], spec: DataSpec, quantizer: Int8Quantizer
) -> nn.Module:
    prepared = prepare(net, spec.input_shape, quantizer)
    load_activation_ranges(prepared, state["ranges"])
    return convert(prepared, spec.input_shape)


def _report(
    prepared: GraphModule, quantizer: Int8Quantizer, context: CompressionContext, how: str
) -> None:
    num_layers = len(quantizer.quantized_layers) + len(quantizer.float_layers)
    context.report(
        "quantisation",
        f"INT8 in {len(quantizer.quantized_layers)} of {num_layers} weighted layers: uint8 "
        f"activations with one scale a tensor, int8 weights with one scale a channel; {how}",
    )
    scans = count_scans(prepared)
    kept = _in_short(quantizer.float_layers)
    if scans:
        kept.append(f"{scans} selective scan{'s' * (scans != 1)}")
    context.report("kept in float", ", ".join(kept) or "nothing")


def _in_short(names: Sequence[str]) -> list[str]:
    """The names, with three or more that end alike as one entry.

    >>> _in_short(["stem", "a.x_proj", "b.x_proj", "c.x_proj"])
    ['stem', '3 x_proj']
    """
    endings = Counter(name.rpartition(".")[2] for name in names)
    often = {ending for ending, count in endings.items() if count > 2 and not ending.isdigit()}
    shortened = (
        f"{endings[ending]} {ending}" if (ending := name.rpartition(".")[2]) in often else name
        for name in names
    )
    return list(dict.fromkeys(shortened))
