"""The 2-D selective scan of VMamba, VM-UNet and MedMamba: Mamba that reads four ways."""

# ruff: noqa: N803 - the letters of the paper

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.models.layers.drop_path import DropPath
from medlite.models.layers.initialization import draw_steps
from medlite.models.layers.scans.directions import NUM_DIRECTIONS, cross_merge, cross_scan
from medlite.models.layers.scans.selective import selective_scan
from medlite.models.layers.scans.ssd import ssd_scan
from medlite.models.layers.ssm import S6, Ssm


class SS2D(nn.Module):
    """Liu et al., "VMamba: Visual State Space Model", arXiv 2401.10166, section 4 and figure 3.

    A Mamba block (see `medlite.models.layers.mamba`) with a 3x3 depth-wise convolution and a
    scan in each of four directions, whose outputs are summed and normalised. The first form of
    the published code is gated; VM-UNet and MedMamba use it. The second one, of VMamba, is not,
    and its convolution has no bias. Parameters carry the names and layouts of that code, the
    four directions P first. All sizes are read from the weights, so the layer still works when
    inner channels were pruned.

    What the scans need is projected before the maps are read in four directions, not after it:
    the same function, but R + 2N features are copied instead of D.

    With `ssm.kind="ssd"` a step and a rate belong to a head: `dt_projs_weight` (P, H, R),
    `dt_projs_bias` and `A_logs` (P, H).

    Args:
        d_model: C, channels of the maps.
        ssm: the recurrence; N is its `d_state`.
        expand: inner channels D = expand C.
        is_gated: multiply by SiLU of a second projection of the input.
        conv_bias: whether the depth-wise convolution has a bias.
        is_shared: one set of scan parameters for all four directions (P = 1).
    """

    def __init__(
        self,
        d_model: int,
        ssm: Ssm = S6,
        *,
        expand: int = 2,
        is_gated: bool = True,
        conv_bias: bool = True,
        is_shared: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.is_gated = ssm.kind, is_gated
        sets = 1 if is_shared else NUM_DIRECTIONS
        d_inner, rank = expand * d_model, math.ceil(d_model / 16)
        steps = d_inner if ssm.kind == "s6" else ssm.num_heads(d_inner)
        self.in_proj = nn.Linear(d_model, (1 + is_gated) * d_inner, bias=False)
        self.conv2d = nn.Conv2d(
            d_inner, d_inner, kernel_size=3, padding=1, groups=d_inner, bias=conv_bias
        )
        self.x_proj_weight = nn.Parameter(torch.empty(sets, rank + 2 * ssm.d_state, d_inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(sets, steps, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(sets, steps))
        rates = (sets * steps, ssm.d_state) if ssm.kind == "s6" else (sets, steps)
        self.A_logs = nn.Parameter(torch.empty(rates))
        self.Ds = nn.Parameter(torch.ones(sets * d_inner))
        self.out_norm = nn.LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self._init_scans()

    @torch.no_grad()
    def _init_scans(self) -> None:
        """Rates 1 to N (ssd: uniform in [1, 16]), steps as Mamba draws them."""
        nn.init.uniform_(self.x_proj_weight, -1, 1).mul_(self.x_proj_weight.shape[-1] ** -0.5)
        draw_steps(self.dt_projs_weight, self.dt_projs_bias)
        if self.kind == "s6":
            self.A_logs.copy_(torch.arange(1.0, self.A_logs.shape[-1] + 1).log())
        else:
            self.A_logs.uniform_(1, 16).log_()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); every pixel sees all others."""
        x, *gates = self.in_proj(maps).chunk(1 + self.is_gated, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        mixed = self.out_norm(self._scan(x))
        return self.out_proj(mixed * F.silu(gates[0]) if self.is_gated else mixed)

    def _scan(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D), the sum of the four directions."""
        sets, _, rank = self.dt_projs_weight.shape
        d_state = (self.x_proj_weight.shape[1] - rank) // 2
        projected = torch.matmul(x, self.x_proj_weight.flatten(0, 1).mT)
        projected = projected.unflatten(-1, (sets, -1)).permute(0, 3, 1, 2, 4)
        steps, B, C = cross_scan(projected).split([rank, d_state, d_state], dim=-1)
        steps = torch.matmul(steps, self.dt_projs_weight.mT) + self.dt_projs_bias.unsqueeze(1)
        mixed = self._recur(cross_scan(x.unsqueeze(1)), F.softplus(steps), B, C)
        return cross_merge(mixed, (x.shape[1], x.shape[2]))

    def _recur(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """(B, 4, L, D) -> (B, 4, L, D); a shared set of parameters serves all directions."""
        sets = self.dt_projs_weight.shape[0]
        A = -self.A_logs.exp()
        D = self.Ds.unflatten(0, (sets, -1)).expand(NUM_DIRECTIONS, -1)
        if self.kind == "ssd":
            return ssd_scan(x, delta, A.expand(NUM_DIRECTIONS, -1), B, C, D)
        A = A.unflatten(0, (sets, -1)).expand(NUM_DIRECTIONS, -1, -1)
        return selective_scan(x, delta, A, B, C, D)


class VSSBlock(nn.Module):
    """The visual state-space block of VM-UNet: a residual SS2D layer, no MLP.

    Ruan et al., arXiv 2402.02491, figure 2.

    Args:
        width: C, channels.
        drop_path_rate: of its branch.
        ssm: the recurrence.
    """

    def __init__(self, width: int, drop_path_rate: float, ssm: Ssm) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.self_attention = SS2D(width, ssm)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return maps + self.drop_path(self.self_attention(self.ln_1(maps)))
