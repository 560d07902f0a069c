"""How vision transformers, and networks built like them, draw their first weights."""

from __future__ import annotations

from torch import nn

STANDARD_DEVIATION = 0.02


def draw_linear_layers(net: nn.Module) -> None:
    """Truncated normal weights and zero biases for all linear layers of `net`, in place.

    Touvron et al., "Training data-efficient image transformers", arXiv 2012.12877, section 6.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=STANDARD_DEVIATION)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
