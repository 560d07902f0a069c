"""MK-UNet: a U of depth-wise convolutions with several kernel sizes side by side."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.channel_shuffle import channel_shuffle
from medlite.models.layers.sizes import require_divisible_sides

KERNEL_SIZES = (1, 3, 5)
EXPANSION = 2
"""Hidden channels of a block, in units of its input."""
REDUCTIONS = (16, 16, 16, 8, 4)
"""Of the channels in the channel attentions, from the coarsest scale to the finest."""


class MKUNet(nn.Module):
    """Rahman and Marculescu, "MK-UNet: Multi-kernel Lightweight CNN [...]".

    "[...] for Medical Image Segmentation", arXiv 2509.18493. Five multi-kernel inverted
    residual blocks with max pooling, and five more with bilinear upsampling, each after a channel
    and a spatial attention; the skip connections pass grouped attention gates. As in the published
    code all scales share one spatial attention. That code also builds three heads for deep
    supervision that it never returns, 3 + w1 + w2 + w3 parameters for one class; they are not
    built here. For 3 channels, 1 class and 256x256:

    - T, widths 4-8-16-24-32: 27,353 parameters (27,384 with the 31 of those heads), 0.050 GMACs;
    - S, widths 8-16-32-48-80: 92,991 (93,050 with 59), 0.104 GMACs;
    - base, widths 16-32-64-96-160: 315,451 (315,566 with 115), 0.278 GMACs;
    - M, widths 32-64-128-192-320: 1,149,939 (1,150,166 with 227), 0.883 GMACs;
    - L, widths 64-128-256-384-512: 3,757,667 (3,758,118 with 451), 3.065 GMACs.

    Sides are divisible by 32.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits of each pixel.
        widths: w1 to w5, channels at the five scales; all but the last are even.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (16, 32, 64, 96, 160),
    ) -> None:
        super().__init__()
        _check_widths(widths)
        finer = (in_channels, *widths[:-1])
        self.encoders = nn.ModuleList(
            MultiKernelBlock(channels, width) for channels, width in zip(finer, widths, strict=True)
        )
        coarse_to_fine = widths[::-1]
        self.channel_attentions = nn.ModuleList(
            _ChannelAttention(width, reduction)
            for width, reduction in zip(coarse_to_fine, REDUCTIONS, strict=True)
        )
        self.spatial_attention = _SpatialAttention()
        next_widths = (*coarse_to_fine[1:], widths[0])
        self.decoders = nn.ModuleList(
            MultiKernelBlock(width, next_width)
            for width, next_width in zip(coarse_to_fine, next_widths, strict=True)
        )
        self.gates = nn.ModuleList(GroupedAttentionGate(width) for width in coarse_to_fine[1:])
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        require_divisible_sides(images, model="mk_unet", divisor=32, spatial_dims=2)
        features = images
        scales = []
        for encoder in self.encoders:
            features = F.max_pool2d(encoder(features), 2)
            scales.append(features)
        for stage, gate in enumerate(self.gates):
            features = gate(self._decode(features, stage), scales[-2 - stage])
        return self.head(self._decode(features, len(self.gates)))

    def _decode(self, features: Tensor, stage: int) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W)."""
        attended = self.spatial_attention(self.channel_attentions[stage](features))
        decoded = self.decoders[stage](attended)
        return F.relu(F.interpolate(decoded, scale_factor=2, mode="bilinear"))


class MultiKernelBlock(nn.Module):
    """The multi-kernel inverted residual block (MKIR of the paper).

    Twice the channels go through depth-wise convolutions of 1x1, 3x3 and 5x5 side by side, whose
    sum is shuffled and projected; the input is added, through a 1x1 convolution if the number of
    channels changes.

    Args:
        in_channels: C.
        out_channels: C'.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = EXPANSION * in_channels
        self.expand = nn.Sequential(*_conv_norm(in_channels, hidden), nn.ReLU6())
        self.branches = nn.ModuleList(
            nn.Sequential(*_conv_norm(hidden, hidden, kernel_size, groups=hidden), nn.ReLU6())
            for kernel_size in KERNEL_SIZES
        )
        self.shuffle_groups = math.gcd(hidden, out_channels)
        self.project = nn.Sequential(*_conv_norm(hidden, out_channels))
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        expanded = self.expand(features)
        mixed = functools.reduce(torch.add, [branch(expanded) for branch in self.branches])
        return self.shortcut(features) + self.project(channel_shuffle(mixed, self.shuffle_groups))


class GroupedAttentionGate(nn.Module):
    """The grouped attention gate of a skip connection, whose result is added to the features.

    Args:
        width: C, even.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.gate = nn.Sequential(*_conv_norm(width, half, 3, groups=half, bias=True))
        self.skip = nn.Sequential(*_conv_norm(width, half, 3, groups=half, bias=True))
        self.score = nn.Sequential(*_conv_norm(half, 1, bias=True), nn.Sigmoid())

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """Two of (B, C, H, W) -> (B, C, H, W)."""
        return features + skip * self.score(F.relu(self.gate(features) + self.skip(skip)))


class _ChannelAttention(nn.Module):
    """Weights every channel by the means and the maxima of all channels."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        hidden = width // min(reduction, width)
        self.scores = nn.Sequential(
            nn.Conv2d(width, hidden, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, width, kernel_size=1, bias=False),
        )

    def forward(self, features: Tensor) -> Tensor:
        means, maxima = features.mean((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
        return features * (self.scores(means) + self.scores(maxima)).sigmoid()


class _SpatialAttention(nn.Module):
    """Weights every pixel by its mean and largest channel, and those around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        summary = torch.cat([features.mean(1, keepdim=True), features.amax(1, keepdim=True)], 1)
        return features * self.conv(summary).sigmoid()


def _check_widths(widths: tuple[int, ...]) -> None:
    problems = []
    if len(widths) != len(REDUCTIONS):
        problems.append(f"model.widths: {len(widths)} widths, MKUNet has {len(REDUCTIONS)} scales")
    problems += [
        f"model.widths: {width} is not even, so its attention gate cannot halve it"
        for width in widths[:-1]
        if width % 2
    ]
    if problems:
        raise ConfigError(problems)


def _conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    *,
    groups: int = 1,
    bias: bool = False,
) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        groups=groups,
        bias=bias,
    )
    return conv, nn.BatchNorm2d(out_channels)
