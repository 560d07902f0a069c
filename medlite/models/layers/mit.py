"""Mix Transformer (MiT): an encoder of four scales with attention to shortened sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import ConfigError, ShapeError
from medlite.models.layers.drop_path import DropPath, rising_rates
from medlite.models.layers.initialization import draw_linear_layers
from medlite.models.layers.sizes import by, check_scales, require_spatial_dims

STRIDES = (4, 2, 2, 2)
"""Of the patch embeddings; their kernels, 7x7 and then 3x3, overlap."""

HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)
"""Sides of the squares of pixels that share a key and a value, at each scale."""

MLP_RATIO = 4
EPS = 1e-6
SMALLEST_SIDE = max(math.prod(STRIDES[: i + 1]) * (r - 1) + 1 for i, r in enumerate(REDUCTIONS))
"""From here on every scale has one whole square of pixels at least."""


class MixTransformer(nn.Module):
    """The encoder of Xie et al., "SegFormer", arXiv 2105.15203, section 3.1.

    No position embeddings: the 3x3 convolutions of the MLPs tell where a pixel is. The defaults
    are MiT-B0, 3,319,392 parameters for 3 channels; the heads and reductions are those of all
    published sizes.

    Args:
        in_channels: C, channels of the images.
        widths: channels of each scale, divisible by its heads (1, 2, 5, 8).
        depths: blocks of each scale.
        drop_path_rate: of the last block.

    Raises:
        ConfigError: not four scales, or a width that its heads cannot share.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        widths: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (2, 2, 2, 2),
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        _check(widths, depths)
        entering = (in_channels, *widths[:-1])
        rates = rising_rates(drop_path_rate, tuple(depths))
        self.stages = nn.ModuleList(
            _Stage(PatchOverlap(narrow, wide, stride), wide, heads, reduction, stage_rates)
            for narrow, wide, stride, heads, reduction, stage_rates in zip(
                entering, widths, STRIDES, HEADS, REDUCTIONS, rates, strict=True
            )
        )
        draw_linear_layers(self)
        _draw_convolutions(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> (B, C', H / s, W / s) for s of 4, 8, 16, 32, rounded up."""
        scales = []
        features = images
        for stage in self.stages:
            features = stage(features)
            scales.append(features)
        return scales


class PatchOverlap(nn.Module):
    """Overlapping patches as tokens ("overlapped patch merging"), normalised.

    Args:
        in_channels: C'.
        width: C.
        stride: kernels have sides of 2 stride - 1.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        side = 2 * stride - 1
        self.proj = nn.Conv2d(in_channels, width, side, stride=stride, padding=stride - 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C', H, W) -> (B, H / stride, W / stride, C), rounded up."""
        return self.norm(self.proj(features).permute(0, 2, 3, 1))


class ReducedAttention(nn.Module):
    """Attention of all pixels to keys and values that stand for r x r pixels each.

    "Efficient self-attention" (equations 1 and 2). The sequence is shortened by a strided
    convolution, as in the published code: the same function as the paper's reshape and linear
    layer. Pixels at the last rows and columns that fill no whole square ask for keys and values
    but offer none.

    Args:
        width: C, channels, divisible by `num_heads`.
        num_heads: of the attention.
        reduction: r.
    """

    def __init__(self, width: int, num_heads: int, reduction: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.reduce = _Reduction(width, reduction) if reduction > 1 else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        key, value = self.kv(self.reduce(maps)).flatten(1, 2).chunk(2, dim=-1)
        query = self.q(maps).flatten(1, 2)
        query, key, value = (self._split(part) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.proj(mixed).unflatten(1, maps.shape[1:3])

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, heads, L, C / heads)."""
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class MixFFN(nn.Module):
    """An MLP with a depth-wise 3x3 convolution of its hidden channels (equation 3).

    Args:
        width: C, channels.
        hidden: channels inside.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        hidden = self.dwconv(self.fc1(maps).permute(0, 3, 1, 2))
        return self.fc2(F.gelu(hidden).permute(0, 2, 3, 1))


class MixBlock(nn.Module):
    """Attention and a Mix-FFN, both normalised before and residual.

    Args:
        width: C, channels.
        num_heads: of the attention.
        reduction: r of the attention.
        drop_path_rate: of both branches.
    """

    def __init__(self, width: int, num_heads: int, reduction: int, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = ReducedAttention(width, num_heads, reduction)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = MixFFN(width, MLP_RATIO * width)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        maps = maps + self.drop_path(self.attn(self.norm1(maps)))
        return maps + self.drop_path(self.mlp(self.norm2(maps)))


def require_encodable(images: Tensor, *, model: str) -> None:
    """Check that `images` (B, C, H, W) are pictures that a Mix Transformer can take.

    Raises:
        ShapeError: volumes, or a side too short for the squares of the attention.
    """
    require_spatial_dims(images, model=model, spatial_dims=2)
    sides = images.shape[2:]
    if min(sides) < SMALLEST_SIDE:
        mend = 32 * math.ceil(max(SMALLEST_SIDE, *sides) / 32)
        message = f"model={model} needs sides of {SMALLEST_SIDE} pixels or more, got {by(sides)}"
        raise ShapeError(message, size=(mend, mend))


class _Stage(nn.Module):
    """(B, C', H, W) -> (B, C, H / stride, W / stride)."""

    def __init__(
        self,
        patch_embed: nn.Module,
        width: int,
        num_heads: int,
        reduction: int,
        drop_path_rates: Sequence[float],
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.Sequential(
            *(MixBlock(width, num_heads, reduction, rate) for rate in drop_path_rates)
        )
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.blocks(self.patch_embed(features))).permute(0, 3, 1, 2)


class _Reduction(nn.Module):
    """(B, H, W, C) -> (B, H / r, W / r, C), rounded down."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.sr = nn.Conv2d(width, width, kernel_size=reduction, stride=reduction)
        self.norm = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(self.sr(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def _check(widths: Sequence[int], depths: Sequence[int]) -> None:
    check_scales(widths, depths, divisor=1)
    if len(widths) != len(HEADS):
        raise ConfigError([f"model.widths: {len(widths)} scales given, a MiT has {len(HEADS)}"])
    problems = [
        f"model.widths: {width} channels cannot be shared by {heads} heads"
        for width, heads in zip(widths, HEADS, strict=True)
        if width % heads
    ]
    if problems:
        raise ConfigError(problems)


def _draw_convolutions(net: nn.Module) -> None:
    """Normal weights that keep the variance of gradients, zero biases, as the published code."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * math.prod(layer.kernel_size) // layer.groups
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
