"""8-bit rounding with straight-through gradients, and the ranges that it uses.

Written for `torchao.quantization.pt2e`, in place of its observers, so that three things hold by
construction: the parameters that are converted are the ones that the forward pass used, nothing
is learnt from a batch unless a mode says so, and every buffer has its final shape from the start.
Scheme: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv:1712.05877, with signed per-channel weights.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.observer import ObserverBase

from medlite.compression.value_counts import ValueCounts
from medlite.compression.weight_rounding import PerChannelFakeQuantize

Mode = Literal["measure", "search", "count", "train", "apply"]
"""measure: widen the range, change nothing. search: score narrower ranges, change nothing.
count: count the values for their percentiles, change nothing.
train: round, the range follows the batches. apply: round with the range as it is."""

RANGE_MOMENTUM = 0.05
"""weight of one training batch in the running range: some 20 batches are remembered"""

NUM_FRACTIONS = 36
LEAST_FRACTION = 0.3
NUM_SCORED_VALUES = 16384
"""values of one batch, drawn at random, that the search for a narrower range looks at"""


class PerTensorFakeQuantize(ObserverBase):
    """Activations: asymmetric, one scale and zero point a tensor.

    `low` and `high` are the range; it always holds zero, which then has an exact code.
    """

    low: Tensor
    high: Tensor
    squared_errors: Tensor

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.quant_min, self.quant_max, self.qscheme = quant_min, quant_max, qscheme
        self.mode: Mode = "measure"
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.counts = ValueCounts()
        self.register_buffer("squared_errors", torch.zeros(NUM_FRACTIONS), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """The values, rounded unless the mode only looks at them; same shape and type."""
        if self.mode == "measure":
            self._move_range(values, momentum=None)
            return values
        if self.mode == "search":
            self._score(values)
            return values
        if self.mode == "count":
            self.counts.add(values)
            return values
        if self.mode == "train":
            self._move_range(values, momentum=RANGE_MOMENTUM)
        return self._round(values, *self.calculate_qparams())

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) of the present range, 0-dimensional."""
        return self._scale_and_zero_point(self.low, self.high)

    def set_range_of_least_error(self) -> None:
        """Shrink the range to the fraction that scored best, and forget the scores."""
        best = self._fractions()[self.squared_errors.argmin()]
        self.low.mul_(best)
        self.high.mul_(best)
        self.squared_errors.zero_()

    def set_range_of_percentile(self, percentile: float) -> None:
        """Cut off what lies beyond `percentile` on each side, and forget the counts."""
        share = percentile / 100
        self.low.copy_(self.counts.quantile(1 - share).clamp(min=self.low, max=self.low * 0))
        self.high.copy_(self.counts.quantile(share).clamp(min=self.low * 0, max=self.high))
        self.counts = ValueCounts()

    @torch.no_grad()
    def _move_range(self, values: Tensor, momentum: float | None) -> None:
        lowest, highest = (extreme.float() for extreme in torch.aminmax(values.detach()))
        if momentum is None:
            self.low.copy_(torch.minimum(self.low, lowest))
            self.high.copy_(torch.maximum(self.high, highest))
        else:
            self.low.lerp_(lowest.clamp(max=0.0), momentum)
            self.high.lerp_(highest.clamp(min=0.0), momentum)

    @torch.no_grad()
    def _score(self, values: Tensor) -> None:
        flat = values.detach().float().flatten()
        generator = torch.Generator().manual_seed(flat.numel())
        drawn = torch.randint(flat.numel(), (NUM_SCORED_VALUES,), generator=generator)
        sample = flat[drawn.to(flat.device)]
        for index, fraction in enumerate(self._fractions()):
            rounded = self._round(
                sample, *self._scale_and_zero_point(self.low * fraction, self.high * fraction)
            )
            self.squared_errors[index] += (rounded - sample).square().sum()

    def _fractions(self) -> Tensor:
        return torch.linspace(1.0, LEAST_FRACTION, NUM_FRACTIONS, device=self.low.device)

    def _scale_and_zero_point(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        smallest = torch.finfo(torch.float32).eps
        scale = ((high - low) / (self.quant_max - self.quant_min)).clamp(min=smallest)
        zero_point = self.quant_min - torch.round(low / scale)
        return scale, zero_point.clamp(self.quant_min, self.quant_max).int()

    def _round(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        rounded = torch.fake_quantize_per_tensor_affine(
            values.float(), scale, zero_point, self.quant_min, self.quant_max
        )
        return rounded.to(values.dtype)


def fake_quantizers(net: nn.Module) -> dict[str, PerTensorFakeQuantize | PerChannelFakeQuantize]:
    """The rounding modules of a prepared net, by name; a shared one appears once."""
    kinds = (PerTensorFakeQuantize, PerChannelFakeQuantize)
    return {name: part for name, part in net.named_modules() if isinstance(part, kinds)}


def set_mode(net: nn.Module, mode: Mode) -> None:
    """Put every rounding module of `net` into one mode."""
    for part in fake_quantizers(net).values():
        part.mode = mode
