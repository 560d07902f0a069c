"""MedViT: a classifier of grouped convolutions and attention to pooled tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.drop_path import DropPath, rising_rates
from medlite.models.layers.initialization import STANDARD_DEVIATION
from medlite.models.layers.sizes import require_spatial_dims

STEM_WIDTHS = (64, 32, 64, 64)
NUM_STAGES = 4
ATTENDING_PERIOD = 5
"""Of the third stage: every fifth block attends. In the second and fourth the last one does."""
POOLED_SIDES = (8, 4, 2, 1)
"""R of each stage: R^2 tokens become one key. The first stage has no attention."""
CONV_RATIO, ATTENTION_RATIO = 3, 2
"""Hidden channels of the feed-forwards after convolutions and after attention, in units of C."""
ATTENTION_SHARE = 0.75
"""Of the stochastic depth of a transformer block, as of its channels."""


class MedViT(nn.Module):
    """Manzari et al., arXiv 2302.09462, as the published code builds it.

    "MedViT: A Robust Vision Transformer for Generalized Medical Image Classification". Four
    stages of convolutional blocks (ECB), of which the last three end with a transformer block
    (LTB); in the third every fifth block is one. The paper's sizes (10.8, 23.6 and 45.8 M) are
    not those of its code, which for 3 channels and 1000 classes at 224x224 has:

    - small, depths 3-4-10-3: 32,161,440 parameters (9 classes: 31,145,665), 5.86 GMACs;
    - base, depths 3-4-20-3 and drop_path_rate 0.2: 45,430,972 parameters, 8.36 GMACs;
    - large, depths 3-4-30-3 and drop_path_rate 0.2: 58,700,504 parameters, 10.86 GMACs.

    Any size is taken, sides are halved rounding up. Keys are means of groups of consecutive
    tokens, and a last group that is not full counts as any other's: 20 tokens in groups of 16
    give two keys, 4 tokens give one. That code leaves the rest out and cannot pool fewer tokens
    than a group has. At 224x224, as at all multiples of 32, all groups are full. The batch
    normalisations before attention and feed-forwards are applied always; that code leaves them
    out while exporting to ONNX.

    Args:
        in_channels: channels of the images.
        num_classes: K, logits.
        width: C, channels of the first stage; each further stage doubles them, and its
            transformer blocks give a third more. Divisible by three heads.
        depths: blocks of the four stages, those of the third divisible by 5.
        head_dim: channels of a head of attention and of a group of a convolution.
        drop_path_rate: of the last block.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        width: int = 96,
        depths: tuple[int, ...] = (3, 4, 10, 3),
        head_dim: int = 32,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        _check(width, depths, head_dim)
        stem = zip(pairwise((in_channels, *STEM_WIDTHS)), (2, 1, 1, 2), strict=True)
        self.stem = nn.Sequential(*(_stem_layer(*pair, stride) for pair, stride in stem))
        self.features = nn.Sequential()
        channels = STEM_WIDTHS[-1]
        for stage, rates in enumerate(rising_rates(drop_path_rate, depths)):
            blocks = _stage(stage, channels, width * 2**stage, head_dim, rates)
            self.features.extend(blocks)
            channels = blocks[-1].out_channels
        self.norm = nn.BatchNorm2d(channels)
        self.proj_head = nn.Linear(channels, num_classes)
        _draw_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        require_spatial_dims(images, model="medvit", spatial_dims=2)
        maps = self.norm(self.features(self.stem(images)))
        return self.proj_head(maps.mean((2, 3)))


class ECB(nn.Module):
    """The efficient convolution block: MHCA, then a feed-forward.

    Args:
        in_channels: of the maps that come.
        width: C, channels of the maps that go.
        head_dim: channels of a group.
        drop_path_rate: of the first branch.
        stride: 2 halves the maps.
    """

    def __init__(
        self, in_channels: int, width: int, head_dim: int, drop_path_rate: float, *, stride: int
    ) -> None:
        super().__init__()
        self.out_channels = width
        self.patch_embed = _embedding(in_channels, width, stride)
        self.mhca = _head_convolution(width, head_dim)
        self.drop_path = DropPath(drop_path_rate)
        self.norm = nn.BatchNorm2d(width)
        self.conv = LocalFeedForward(width, CONV_RATIO)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C', H, W) -> (B, C, H, W), or half the size."""
        maps = self.patch_embed(maps)
        maps = maps + self.drop_path(self.mhca(maps))
        return maps + self.conv(self.norm(maps))


class LTB(nn.Module):
    """The local transformer block.

    Attention on C channels, from which a further C / 3 are projected and convolved (MHCA); then
    a feed-forward on both.

    Args:
        in_channels: of the maps that come.
        width: C, channels that attend.
        head_dim: channels of a head and of a group.
        drop_path_rate: of all branches but the last, in the share of their channels.
        pooled_side: R, so that R^2 tokens become one key.
        stride: 2 halves the maps.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        head_dim: int,
        drop_path_rate: float,
        *,
        pooled_side: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.out_channels = width + width // 3
        self.patch_embed = _embedding(in_channels, width, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.e_mhsa = PooledAttention(width, head_dim, pooled_side**2)
        self.attention_drop_path = DropPath(drop_path_rate * ATTENTION_SHARE)
        self.projection = _embedding(width, width // 3, 1)
        self.mhca = _head_convolution(width // 3, head_dim)
        self.convolution_drop_path = DropPath(drop_path_rate * (1 - ATTENTION_SHARE))
        self.norm2 = nn.BatchNorm2d(self.out_channels)
        self.conv = LocalFeedForward(self.out_channels, ATTENTION_RATIO)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C', H, W) -> (B, 4 C / 3, H, W), or half the size."""
        maps = self.patch_embed(maps)
        tokens = self.norm1(maps).flatten(2).transpose(1, 2)
        attended = self.attention_drop_path(self.e_mhsa(tokens))
        maps = maps + attended.transpose(1, 2).unflatten(2, maps.shape[2:])
        local = self.projection(maps)
        local = local + self.convolution_drop_path(self.mhca(local))
        maps = torch.cat([maps, local], dim=1)
        return maps + self.conv(self.norm2(maps))


class PooledAttention(nn.Module):
    """E-MHSA: every token attends to means of consecutive tokens.

    Args:
        width: C, channels.
        head_dim: channels of a head.
        pooled: tokens that become one key; the last key may be of fewer.
    """

    def __init__(self, width: int, head_dim: int, pooled: int) -> None:
        super().__init__()
        self.head_dim, self.pooled = head_dim, pooled
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width) if pooled > 1 else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        sources = tokens
        if self.pooled > 1:
            group = min(self.pooled, tokens.shape[1])
            means = F.avg_pool1d(
                tokens.transpose(1, 2), group, ceil_mode=True, count_include_pad=False
            )
            sources = self.norm(means).transpose(1, 2)
        query, key, value = (
            layer(inputs).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for layer, inputs in ((self.q, tokens), (self.k, sources), (self.v, sources))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class LocalFeedForward(nn.Module):
    """LFFN: widen, convolve each channel, weight it, narrow; residual.

    The weights of the channels come from their means through a layer of `ratio` channels.

    Args:
        width: C, channels.
        ratio: hidden channels in units of C.
    """

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        hidden = ratio * width
        self.conv = nn.Sequential(
            nn.Conv2d(width, hidden, kernel_size=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            _ChannelGate(hidden, hidden // width),
            nn.Conv2d(hidden, width, kernel_size=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return maps + self.conv(maps)


class _ChannelGate(nn.Module):
    """Hu et al., "Squeeze-and-Excitation Networks", arXiv 1709.01507, with a hard sigmoid."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Hardsigmoid()
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps * self.fc(maps.mean((2, 3)))[:, :, None, None]


def _embedding(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Maps of other channels, or of half the size (rounded up); the same maps if neither."""
    layers: list[nn.Module] = []
    if stride == 2:
        layers.append(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False))
    if stride == 2 or in_channels != out_channels:
        layers.append(nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False))
        layers.append(nn.BatchNorm2d(out_channels))
    return nn.Sequential(*layers)


def _head_convolution(width: int, head_dim: int) -> nn.Sequential:
    """MHCA: each group of channels for itself, then all together."""
    groups = width // head_dim
    return nn.Sequential(
        nn.Conv2d(width, width, kernel_size=3, padding=1, groups=groups, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, kernel_size=1, bias=False),
    )


def _stem_layer(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _stage(
    stage: int, channels: int, width: int, head_dim: int, rates: tuple[float, ...]
) -> list[ECB | LTB]:
    """The blocks of a stage; the first one halves the maps, in all stages but the first."""
    blocks: list[ECB | LTB] = []
    for rate, attends in zip(rates, _attends(stage, len(rates)), strict=True):
        stride = 1 if blocks or stage == 0 else 2
        block: ECB | LTB
        if attends:
            pooled_side = POOLED_SIDES[stage]
            block = LTB(channels, width, head_dim, rate, pooled_side=pooled_side, stride=stride)
        else:
            block = ECB(channels, width, head_dim, rate, stride=stride)
        blocks.append(block)
        channels = blocks[-1].out_channels
    return blocks


def _attends(stage: int, depth: int) -> list[bool]:
    """For each block of a stage whether it is a transformer block."""
    if stage == 0:
        return [False] * depth
    period = ATTENDING_PERIOD if stage == 2 else depth
    return [(index + 1) % period == 0 for index in range(depth)]


def _check(width: int, depths: tuple[int, ...], head_dim: int) -> None:
    problems = []
    if width % (3 * head_dim):
        problems.append(f"model.width: {width} is not divisible by three heads of {head_dim}")
    if len(depths) != NUM_STAGES or min(depths) < 1 or depths[2] % ATTENDING_PERIOD:
        problems.append(
            f"model.depths: {list(depths)} are not four stages of at least one block, "
            f"the third a multiple of {ATTENDING_PERIOD}, as in [3, 4, 10, 3]"
        )
    if problems:
        raise ConfigError(problems)


def _draw_weights(net: nn.Module) -> None:
    """Truncated normal weights, as the published code draws them, and zero biases."""
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=STANDARD_DEVIATION)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
