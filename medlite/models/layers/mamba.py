"""The Mamba block: a gated, causal token mixer around a selective scan."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.models.layers.scans.selective import selective_scan

DELTA_MIN, DELTA_MAX = 1e-3, 1e-1
"""Step sizes at initialisation, log-uniform."""


class MambaBlock(nn.Module):
    """Mamba (Gu and Dao, arXiv 2312.00752, section 3.4 and figure 3).

    Parameters carry the names and layouts of the published code, so its weights load. All
    sizes are read from the weights, so the block still works when channels were pruned.

    Args:
        d_model: C, channels of the tokens.
        d_state: N, states of each inner channel.
        expand: inner channels D = expand C.
        d_conv: taps of the causal depth-wise convolution over the tokens.
        dt_rank: R, rank of the step sizes' projection; "auto" is ceil(C / 16).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        dt_rank: int | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        d_inner = expand * d_model
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self._init_steps()

    @torch.no_grad()
    def _init_steps(self) -> None:
        """softplus(dt_proj.bias) is log-uniform in [DELTA_MIN, DELTA_MAX] (section 3.6)."""
        nn.init.uniform_(self.dt_proj.weight, -1, 1).mul_(self.dt_proj.in_features**-0.5)
        delta = torch.empty_like(self.dt_proj.bias)
        delta.uniform_(math.log(DELTA_MIN), math.log(DELTA_MAX)).exp_()
        self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C); a token sees itself and the ones before it."""
        x, gate = self.in_proj(tokens).chunk(2, dim=-1)
        x = self.conv1d(x.transpose(1, 2))[..., : tokens.shape[1]].transpose(1, 2)
        x = F.silu(x)
        rank, d_state = self.dt_proj.weight.shape[1], self.A_log.shape[1]
        steps, B, C = self.x_proj(x).split([rank, d_state, d_state], dim=-1)
        delta = F.softplus(self.dt_proj(steps))
        mixed = selective_scan(x, delta, -self.A_log.exp(), B, C, self.D)
        return self.out_proj(mixed * F.silu(gate))
