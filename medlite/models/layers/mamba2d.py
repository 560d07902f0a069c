"""The Mamba2D layer: a state-space recurrence over an image, beside a local path."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.models.layers.initialization import draw_steps
from medlite.models.layers.scans.wavefront import wavefront_scan


class Mamba2D(nn.Module):
    """Baty et al., "Mamba2D: A Natively Multi-Dimensional State-Space Model for Vision Tasks".

    arXiv 2412.16146. Linear, GELU, wavefront scan, GELU, Linear; and the sum of that with a local
    path of separable convolutions. A scan reads from the upper left corner: the state of a pixel
    is fed by all pixels that are neither below nor right of it. All sizes are read from the
    weights, so the layer still works when channels were pruned.

    What differs from the published code, whose weights do not load: the left and the upper
    neighbour have input weights B of their own, where the code's later versions share one, and
    both sets of rates are one parameter, the left one first.

    Args:
        d_model: C, channels of the maps, and inner channels D of the scan (no expansion).
        d_state: N, states of each channel.
        reads_backwards: read from the lower right corner.
    """

    def __init__(self, d_model: int, d_state: int = 16, *, reads_backwards: bool = False) -> None:
        super().__init__()
        self.reads_backwards = reads_backwards
        rank = math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, d_model)
        self.x_proj = nn.Linear(d_model, 2 * rank + 3 * d_state)
        left, top = nn.Linear(rank, d_model), nn.Linear(rank, d_model)
        for projection in (left, top):
            draw_steps(projection.weight, projection.bias)
        self.dt_proj = nn.ModuleList([left, top])
        rates = torch.arange(1.0, d_state + 1).repeat(2, d_model, 1)
        self.A_logs = nn.Parameter(rates.log())
        self.D = nn.Parameter(torch.ones(d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        self.local_path = LocalPath(d_model)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = F.gelu(self.in_proj(maps))
        mixed = self._scan(x.flip(1, 2)).flip(1, 2) if self.reads_backwards else self._scan(x)
        return self.out_proj(F.gelu(mixed)) + self.local_path(maps)

    def _scan(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        ranks = [projection.get_parameter("weight").shape[1] for projection in self.dt_proj]
        d_state = (self.x_proj.weight.shape[0] - sum(ranks)) // 3
        left, top, *B, C = self.x_proj(x).split([*ranks, *[d_state] * 3], dim=-1)
        steps = [project(step) for project, step in zip(self.dt_proj, (left, top), strict=True)]
        delta = F.softplus(torch.stack(steps, 1))
        return wavefront_scan(x, delta, -self.A_logs.exp(), torch.stack(B, 1), C, self.D)


class LocalPath(nn.Module):
    """The local path of Mamba2D: normalised, widened, convolved channel by channel, narrowed.

    The separable convolution of Yu et al., "MetaFormer Baselines for Vision", arXiv 2210.13452,
    with 3x3 taps instead of 7x7.

    Args:
        width: C, channels.
        expand: inner channels for each channel.
    """

    def __init__(self, width: int, expand: int = 2) -> None:
        super().__init__()
        inner = expand * width
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, inner, bias=False)
        self.act1 = StarReLU()
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.act2 = StarReLU()
        self.narrow = nn.Linear(inner, width, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        inner = self.act1(self.widen(self.norm(maps))).permute(0, 3, 1, 2)
        return self.narrow(self.act2(self.conv(inner)).permute(0, 2, 3, 1))


class StarReLU(nn.Module):
    """s relu(x)^2 + b with learned s and b (Yu et al., arXiv 2210.13452).

    At first of mean 0 and variance 1 where the input is standard normal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.8944]))
        self.bias = nn.Parameter(torch.tensor([-0.4472]))

    def forward(self, features: Tensor) -> Tensor:
        """Any shape."""
        return self.scale * F.relu(features).square() + self.bias
