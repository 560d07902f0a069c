"""The Mamba block: a gated, causal token mixer around a selective scan."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.models.layers.initialization import draw_steps
from medlite.models.layers.scans.selective import selective_scan
from medlite.models.layers.scans.ssd import ssd_scan
from medlite.models.layers.ssm import Ssm

EXPAND = 2
"""Inner channels for each channel of the tokens."""

RATE_MIN, RATE_MAX = 1.0, 16.0
"""Decay rates of heads at initialisation, uniform."""


def mamba_block(d_model: int, ssm: Ssm) -> MambaBlock:
    """The Mamba block for `d_model` channels with the recurrence that `ssm` describes."""
    num_heads = ssm.num_heads(EXPAND * d_model) if ssm.kind == "ssd" else None
    return MambaBlock(d_model, ssm.d_state, num_heads=num_heads)


class MambaBlock(nn.Module):
    """Mamba (Gu and Dao, arXiv 2312.00752, section 3.4 and figure 3).

    Parameters carry the names and layouts of the published code, so its weights load. All
    sizes are read from the weights, so the block still works when channels were pruned.

    With `num_heads` the scan is that of Mamba-2 (Dao and Gu, arXiv 2405.21060): a step and a
    decay rate belong to a head, not to a channel (and state), so that `dt_proj` gives H values
    and `A_log` is (H,). Everything else stays as it is; it is not the whole block of that paper,
    which also normalises before the last projection and convolves B and C.

    Args:
        d_model: C, channels of the tokens.
        d_state: N, states of each inner channel.
        expand: inner channels D = expand C.
        d_conv: taps of the causal depth-wise convolution over the tokens.
        dt_rank: R, rank of the step sizes' projection; "auto" is ceil(C / 16).
        num_heads: H, a divisor of D; None: the scan of Mamba.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        *,
        expand: int = EXPAND,
        d_conv: int = 4,
        dt_rank: int | Literal["auto"] = "auto",
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        d_inner = expand * d_model
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, num_heads or d_inner)
        self.A_log = nn.Parameter(_initial_rates(d_inner, d_state, num_heads).log())
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        draw_steps(self.dt_proj.weight, self.dt_proj.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C); a token sees itself and the ones before it."""
        x, gate = self.in_proj(tokens).chunk(2, dim=-1)
        x = self.conv1d(x.transpose(1, 2))[..., : tokens.shape[1]].transpose(1, 2)
        x = F.silu(x)
        rank = self.dt_proj.weight.shape[1]
        d_state = (self.x_proj.weight.shape[0] - rank) // 2
        steps, B, C = self.x_proj(x).split([rank, d_state, d_state], dim=-1)
        delta = F.softplus(self.dt_proj(steps))
        scan = selective_scan if self.A_log.ndim == 2 else ssd_scan
        mixed = scan(x, delta, -self.A_log.exp(), B, C, self.D)
        return self.out_proj(mixed * F.silu(gate))


def _initial_rates(d_inner: int, d_state: int, num_heads: int | None) -> Tensor:
    """1 to N for every channel, or one for each head."""
    if num_heads is None:
        return torch.arange(1.0, d_state + 1).repeat(d_inner, 1)
    return torch.empty(num_heads).uniform_(RATE_MIN, RATE_MAX)
