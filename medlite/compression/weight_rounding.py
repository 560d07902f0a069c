"""Rounding of weights, in training and in the converted graph alike.

Symmetric codes around zero, always from the weights as they are: nothing of it is part of a state.
Shapes in docstrings: M output channels, N weights of one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import ObserverBase

NUM_FRACTIONS = 32
LEAST_FRACTION = 0.05
"""of the largest weight: where the search for the scale of least error ends"""

NUM_REFINEMENTS = 4
SMALLEST_SCALE = torch.finfo(torch.float32).eps
LEAST_WIDE_CODE = 63
"""from this largest code (7 bits) on, the largest weight may have it"""


class PerChannelFakeQuantize(ObserverBase):
    """Rounds a weight to the codes from `quant_min` to `quant_max`.

    With 7 or 8 bits the largest weight gets the largest code. With fewer, that would round most
    weights to zero, so the scale is the one of least squared error: Nagel et al., "A White Paper
    on Neural Network Quantization", arXiv:2106.08295, section 3.1; for ternary weights this is
    the aim of Li et al., "Ternary Weight Networks", arXiv:1605.04711, section 2.2, with a scale a
    channel.

    `scale` (M,) is not part of the state: a forward pass gives it its shape and its values.
    torchao hands `ch_axis` to classes whose name contains "PerChannel" only.

    Args:
        dtype: of the codes.
        quant_min: the least code.
        quant_max: the largest code.
        qscheme: as torch names the kinds of scales.
        ch_axis: the axis of the output channels.
        is_dynamic: always false for weights.
        shares_scale: all channels get the same scale. They stay M numbers, and thus part of the
            converted graph's state, until an export that knows one scale a tensor merges them.
    """

    scale: Tensor

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        ch_axis: int,
        is_dynamic: bool = False,
        shares_scale: bool = False,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.quant_min, self.quant_max, self.qscheme = quant_min, quant_max, qscheme
        self.ch_axis, self.shares_scale = ch_axis, shares_scale
        self.mode = "measure"
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, rounded unless activations are being calibrated; same shape."""
        self.scale = self._find_scale(weight.detach().float())
        if self.mode in ("measure", "search", "count"):
            return weight
        return _RoundStraightThrough.apply(weight, self._along_axis(weight), self.quant_max)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales of the last forward pass, and zero points of their shape, which are zero."""
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int32)

    def _find_scale(self, weight: Tensor) -> Tensor:
        num_channels = weight.shape[self.ch_axis]
        rows = weight.movedim(self.ch_axis, 0).reshape(1 if self.shares_scale else num_channels, -1)
        if self.quant_max >= LEAST_WIDE_CODE:
            scale = rows.abs().amax(1) / self.quant_max
        else:
            scale = scale_of_least_error(rows, self.quant_max)
        return scale.clamp(min=SMALLEST_SCALE).expand(num_channels).contiguous()

    def _along_axis(self, weight: Tensor) -> Tensor:
        shape = [1] * weight.ndim
        shape[self.ch_axis] = -1
        return self.scale.view(shape)


@torch.no_grad()
def scale_of_least_error(rows: Tensor, largest_code: int) -> Tensor:
    """The scale (M,) of each of `rows` (M, N) whose codes -largest .. largest err least in square.

    A search over fractions of the largest weight, then turns of "round to the codes" and "fit
    the scale to them", neither of which can raise the error.
    """
    largest = rows.abs().amax(1) / largest_code
    best, least_error = largest, torch.full_like(largest, float("inf"))
    for fraction in torch.linspace(1.0, LEAST_FRACTION, NUM_FRACTIONS).tolist():
        scale = largest * fraction
        error = (rows - scale[:, None] * _codes(rows, scale, largest_code)).square().sum(1)
        best = torch.where(error < least_error, scale, best)
        least_error = torch.minimum(error, least_error)
    for _ in range(NUM_REFINEMENTS):
        codes = _codes(rows, best, largest_code)
        fitted = (rows * codes).sum(1) / codes.square().sum(1).clamp(min=1)
        best = torch.where(fitted > 0, fitted, best)
    return best


def _codes(rows: Tensor, scale: Tensor, largest_code: int) -> Tensor:
    scale = scale.clamp(min=SMALLEST_SCALE)[:, None]
    return (rows / scale).round().clamp(-largest_code, largest_code)


class _RoundStraightThrough(torch.autograd.Function):
    """Rounds to codes times scale; the gradient passes as if nothing were rounded.

    It also passes where the weight is cut off: at the scale of least error that is a fair share
    of the weights, and these could otherwise never come back.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, largest_code: int) -> Tensor:
        codes = (weight.float() * (1 / scale)).round().clamp(-largest_code, largest_code)
        return (codes * scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None
