"""How networks draw their first weights, where torch's own draw is not the published one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

STANDARD_DEVIATION = 0.02

DELTA_MIN, DELTA_MAX = 1e-3, 1e-1
"""Step sizes of state-space layers at initialisation, log-uniform."""


def draw_linear_layers(net: nn.Module) -> None:
    """Truncated normal weights and zero biases for all linear layers of `net`, in place.

    Touvron et al., "Training data-efficient image transformers", arXiv 2012.12877, section 6.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=STANDARD_DEVIATION)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def draw_steps(weight: Tensor, bias: Tensor) -> None:
    """The projection of the step sizes of a scan, in place: softplus(bias) is log-uniform.

    Gu and Dao, "Mamba", arXiv 2312.00752, section 3.6.

    Args:
        weight: (..., D, R), uniform in +-R^-1/2 then.
        bias: (..., D).
    """
    nn.init.uniform_(weight, -1, 1).mul_(weight.shape[-1] ** -0.5)
    delta = torch.empty_like(bias)
    delta.uniform_(math.log(DELTA_MIN), math.log(DELTA_MAX)).exp_()
    bias.copy_(delta + torch.log(-torch.expm1(-delta)))
