"""The shapes and operands that all variants of the scan are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medlite.models.layers.ssm import Ssm

NUM_STATES = 16


class Operands(NamedTuple):
    """x, delta (B, 1, L, D), A (1, D, N), B and C (B, 1, L, N), D (1, D): one parameter set."""

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor


@dataclass(frozen=True)
class Case:
    """B samples of L tokens with D channels, 16 states each, as a published model has them."""

    name: str
    batch: int
    length: int
    channels: int

    @property
    def num_elements(self) -> int:
        """E = B L D N, what times and memory are divided by."""
        return self.batch * self.length * self.channels * NUM_STATES

    @property
    def shape(self) -> str:
        """In words."""
        return f"{self.batch}x{self.length}x{self.channels}"

    def operands(self, kind: str = "s6") -> Operands:
        """Normal x, B and C, steps log-uniform in [1e-3, 1e-1], rates around -1 to -16.

        Of the kind "ssd", a head of `Ssm`'s size has the step and the rate of its first channel.
        """
        generator = torch.Generator().manual_seed(0)
        tokens = (self.batch, 1, self.length)
        x = torch.randn(*tokens, self.channels, generator=generator)
        delta = 1e-3 * 100 ** torch.rand(*tokens, self.channels, generator=generator)
        B, C = torch.randn(2, *tokens, NUM_STATES, generator=generator)
        jitter = 0.9 + 0.2 * torch.rand(1, self.channels, NUM_STATES, generator=generator)
        A = -torch.arange(1.0, NUM_STATES + 1) * jitter
        D = torch.randn(1, self.channels, generator=generator)
        if kind == "ssd":
            head_dim = self.channels // Ssm(kind="ssd").num_heads(self.channels)
            delta, A = delta[..., ::head_dim], 16 * A[:, ::head_dim, 0]
        return Operands(x, delta.contiguous(), A, B, C, D)


CASES = {
    case.name: case
    for case in (
        Case("UL", 4, 1024, 12),
        Case("N", 1, 4096, 16),
        Case("LM", 1, 4096, 64),
        Case("VM", 4, 3136, 192),
        Case("D3", 1, 32768, 32),
    )
}
"""UltraLight VM-UNet's longest scan, narrow and long, LightM-UNet, VM-UNet, and a volume."""
