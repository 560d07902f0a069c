"""U-Lite: a U of axial depth-wise convolutions, 878,417 parameters."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.sizes import require_divisible_sides

DILATIONS = (1, 2, 3)
"""Of the parallel convolutions in the bottleneck."""


class ULite(nn.Module):
    """Dinh et al., "1M parameters are enough? A lightweight CNN-based model [...]".

    "[...] for medical image segmentation", arXiv 2306.16103. The 7x7 convolutions of a U-Net are
    replaced by a 7x1 and a 1x7 depth-wise one that are added to their input, and 1x1
    convolutions. 878,417 parameters for 3 channels and 1 class, 0.737 GMACs at 256x256. Sides
    are divisible by 2 per scale, 32 by default.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits of each pixel.
        widths: channels at the scales from full size to the bottleneck, whose is divisible by 4.
        kernel_size: of the axial convolutions outside the bottleneck, odd.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (16, 32, 64, 128, 256, 512),
        kernel_size: int = 7,
    ) -> None:
        super().__init__()
        _check(widths, kernel_size)
        self.stem = nn.Conv2d(in_channels, widths[0], kernel_size=7, padding=3)
        pairs = list(itertools.pairwise(widths))
        self.encoders = nn.ModuleList(
            _EncoderStage(fine, coarse, kernel_size) for fine, coarse in pairs
        )
        self.bottleneck = _Bottleneck(widths[-1])
        self.decoders = nn.ModuleList(
            _DecoderStage(coarse, fine, kernel_size) for fine, coarse in reversed(pairs)
        )
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)
        self.divisor = 2 ** len(pairs)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        require_divisible_sides(images, model="u_lite", divisor=self.divisor, spatial_dims=2)
        features = self.stem(images)
        skips = []
        for encoder in self.encoders:
            features, skip = encoder(features)
            skips.append(skip)
        features = self.bottleneck(features)
        for decoder, skip in zip(self.decoders, reversed(skips), strict=True):
            features = decoder(features, skip)
        return self.head(features)


class AxialConv(nn.Module):
    """The axial depth-wise convolution (section II of the paper): a cross of weights, residual.

    Args:
        width: C, channels.
        kernel_size: k, odd.
        dilation: of the kernels.
    """

    def __init__(self, width: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__()
        reach = dilation * (kernel_size // 2)
        self.vertical = nn.Conv2d(
            width, width, (kernel_size, 1), padding=(reach, 0), dilation=dilation, groups=width
        )
        self.horizontal = nn.Conv2d(
            width, width, (1, kernel_size), padding=(0, reach), dilation=dilation, groups=width
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return features + self.vertical(features) + self.horizontal(features)


class _EncoderStage(nn.Module):
    """Features at half the size, and those that skip to the decoder."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.axial = AxialConv(in_channels, kernel_size)
        self.norm = nn.BatchNorm2d(in_channels)
        self.widen = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        skip = self.norm(self.axial(features))
        return F.gelu(F.max_pool2d(self.widen(skip), 2)), skip


class _Bottleneck(nn.Module):
    """A quarter of the channels, together with three dilated axial convolutions of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        quarter = width // (1 + len(DILATIONS))
        self.narrow = nn.Conv2d(width, quarter, kernel_size=1)
        self.branches = nn.ModuleList(AxialConv(quarter, 3, dilation) for dilation in DILATIONS)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        narrow = self.narrow(features)
        parts = [narrow, *(branch(narrow) for branch in self.branches)]
        return F.gelu(self.mix(self.norm(torch.cat(parts, dim=1))))


class _DecoderStage(nn.Module):
    """Features at twice the size, joined by those of the encoder."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(in_channels + out_channels, out_channels, kernel_size=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.axial = AxialConv(out_channels, kernel_size)
        self.mix = nn.Conv2d(out_channels, out_channels, kernel_size=1)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        upsampled = F.interpolate(features, scale_factor=2, mode="nearest")
        narrow = self.narrow(torch.cat([upsampled, skip], dim=1))
        return F.gelu(self.mix(self.axial(self.norm(narrow))))


def _check(widths: tuple[int, ...], kernel_size: int) -> None:
    problems = []
    num_parts = 1 + len(DILATIONS)
    if widths[-1] % num_parts:
        problems.append(f"model.widths: the last, {widths[-1]}, is not divisible by {num_parts}")
    if kernel_size % 2 == 0:
        problems.append(f"model.kernel_size: {kernel_size} is not odd")
    if problems:
        raise ConfigError(problems)
