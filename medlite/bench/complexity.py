"""Parameters and multiply-adds of a network in the form that is deployed."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.export.trace import deployable
from medlite.types import Measurement


def count_complexity(net: nn.Module, input_shape: tuple[int, ...]) -> list[Measurement]:
    """`complexity/params` and `complexity/gmacs` for one image.

    Multiply-adds are half the floating-point operations that torch counts operator by operator:
    convolutions, matrix products and attention, and selective scans by the formula that they
    register (9 B L D N + 2 B L D). Norms, activations and other element-wise work is left out, as
    the field's tables do. Counters that walk over modules miss whatever a module computes
    without a layer of its own.

    Args:
        net: counted in its deployable form; a re-parameterised network is counted fused.
        input_shape: (C, H, W[, D]) of one image.
    """
    deployed = deployable(net)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        deployed(torch.zeros(1, *input_shape))
    shape = "x".join(str(side) for side in input_shape)
    return [
        Measurement(
            name="complexity/params",
            value=_count_parameters(deployed),
            unit="parameters",
            n=1,
            higher_is_better=False,
            note="deployed form",
        ),
        Measurement(
            name="complexity/gmacs",
            value=counter.get_total_flops() / 2 / 1e9,
            unit="GMACs",
            n=1,
            higher_is_better=False,
            note=f"deployed form, one image of {shape}; convolutions, products and scans",
        ),
    ]


def _count_parameters(net: nn.Module) -> int:
    """Elements of all weights; quantised graphs keep theirs in `_frozen_param` buffers."""
    count = sum(parameter.numel() for parameter in net.parameters())
    if isinstance(net, fx.GraphModule):
        buffers = net.named_buffers()
        count += sum(b.numel() for name, b in buffers if name.startswith("_frozen_param"))
    return count
