"""ESPNet: a segmentation network of spatial pyramids of dilated convolutions."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.sizes import require_divisible_sides

DILATIONS = (1, 2, 4, 8, 16)
NORM_EPSILON = 1e-3
STAGE_WIDTHS = (16, 64, 128)
"""Channels at a half, a quarter and an eighth of the size, before they are joined."""


class ESPNet(nn.Module):
    """Mehta et al., "ESPNet: Efficient Spatial Pyramid of Dilated Convolutions [...]".

    "[...] for Semantic Segmentation", arXiv 1803.06815. An encoder of pyramids to an eighth of
    the size, and a light decoder of transposed convolutions. The published code gives every layer
    of the decoder as many channels as there are classes, and so cannot have fewer than 5; here
    `decoder_width` is free. With 20 of both and 3 channels the network is the published one,
    365,109 parameters and 4.78 GMACs at 512x1024. Sides are divisible by 8.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits of each pixel.
        depths: pyramids at a quarter and at an eighth of the size (alpha 2 and 3 of the paper).
        decoder_width: channels of the decoder, at least 5.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        depths: tuple[int, int] = (2, 8),
        decoder_width: int = 20,
    ) -> None:
        super().__init__()
        if decoder_width < len(DILATIONS):
            problem = f"model.decoder_width: {decoder_width} is less than {len(DILATIONS)}"
            raise ConfigError([f"{problem}, one channel for each dilation of a pyramid"])
        width = decoder_width
        self.encoder = Encoder(in_channels, depths)
        level1_width, level2_width, level3_width = self.encoder.widths
        self.reduce3 = _conv(level3_width, width, 1)
        self.norm3 = nn.BatchNorm2d(width, eps=NORM_EPSILON)
        self.upsample3 = _double(width, width)
        self.reduce2 = _conv(level2_width, width, 1)
        self.merge2 = nn.Sequential(_norm_act(2 * width), Pyramid(2 * width, width))
        self.upsample2 = nn.Sequential(_double(width, width), _norm_act(width))
        self.merge1 = nn.Sequential(_conv(level1_width + width, width, 3), _norm_act(width))
        self.head = _double(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        require_divisible_sides(images, model="espnet", divisor=8, spatial_dims=2)
        level1, level2, level3 = self.encoder(images)
        coarse = self.upsample3(self.norm3(self.reduce3(level3)))
        middle = self.upsample2(self.merge2(torch.cat([self.reduce2(level2), coarse], dim=1)))
        return self.head(self.merge1(torch.cat([middle, level1], dim=1)))


class ESPNetC(nn.Module):
    """ESPNet-C of the same paper: the encoder, a 1x1 convolution and bilinear upsampling.

    349,449 parameters for 3 channels and 20 classes, 3.47 GMACs at 512x1024. The published
    code returns the logits at an eighth of the size; here they are brought to the size of the
    image. Sides are divisible by 8.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits of each pixel.
        depths: pyramids at a quarter and at an eighth of the size (alpha 2 and 3 of the paper).
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self, *, in_channels: int, num_classes: int, depths: tuple[int, int] = (2, 8)
    ) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels, depths)
        self.head = _conv(self.encoder.widths[-1], num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        require_divisible_sides(images, model="espnet_c", divisor=8, spatial_dims=2)
        logits = self.head(self.encoder(images)[-1])
        return F.interpolate(logits, scale_factor=8, mode="bilinear")


class Encoder(nn.Module):
    """Features at a half, a quarter and an eighth of the size, with the image joined to two.

    Args:
        in_channels: C, channels of the images.
        depths: pyramids at a quarter and at an eighth of the size.
    """

    def __init__(self, in_channels: int, depths: tuple[int, int]) -> None:
        super().__init__()
        width1, width2, width3 = STAGE_WIDTHS
        self.widths = (width1 + in_channels, 2 * width2 + in_channels, 2 * width3)
        joined1, joined2, joined3 = self.widths
        self.stem = nn.Sequential(_conv(in_channels, width1, 3, stride=2), _norm_act(width1))
        self.norm_act1 = _norm_act(joined1)
        self.shrink2 = Pyramid(joined1, width2, stride=2)
        self.stage2 = _residual_pyramids(width2, depths[0])
        self.norm_act2 = _norm_act(joined2)
        self.shrink3 = Pyramid(joined2, width3, stride=2)
        self.stage3 = _residual_pyramids(width3, depths[1])
        self.norm_act3 = _norm_act(joined3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> maps of the sizes H / 2, H / 4 and H / 8."""
        half = F.avg_pool2d(images, kernel_size=3, stride=2, padding=1)
        quarter = F.avg_pool2d(half, kernel_size=3, stride=2, padding=1)
        level1 = self.norm_act1(torch.cat([self.stem(images), half], dim=1))
        shrunk = self.shrink2(level1)
        level2 = self.norm_act2(torch.cat([self.stage2(shrunk), shrunk, quarter], dim=1))
        shrunk = self.shrink3(level2)
        level3 = self.norm_act3(torch.cat([shrunk, self.stage3(shrunk)], dim=1))
        return level1, level2, level3


class Pyramid(nn.Module):
    """The efficient spatial pyramid (ESP, section 3 of the paper).

    A reduction to a fifth of the channels, dilated 3x3 convolutions side by side, whose results
    are summed up from the second dilation on (which hides the grid) and concatenated.

    Args:
        in_channels: C.
        out_channels: C', at least 5; what 5 does not divide goes to the first dilation.
        stride: 2 halves the size by a 3x3 reduction, 1 keeps it with a 1x1 one.
        is_residual: adds the input before the normalisation; C' is C then.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, is_residual: bool = False
    ) -> None:
        super().__init__()
        width = out_channels // len(DILATIONS)
        first_width = out_channels - (len(DILATIONS) - 1) * width
        self.reduce = _conv(in_channels, width, kernel_size=2 * stride - 1, stride=stride)
        self.branches = nn.ModuleList(
            _conv(width, first_width if dilation == 1 else width, 3, dilation=dilation)
            for dilation in DILATIONS
        )
        self.is_residual = is_residual
        self.norm_act = _norm_act(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        reduced = self.reduce(features)
        first, total, *others = (branch(reduced) for branch in self.branches)
        parts = [first, total]
        for other in others:
            total = total + other
            parts.append(total)
        pyramid = torch.cat(parts, dim=1)
        return self.norm_act(features + pyramid if self.is_residual else pyramid)


def _residual_pyramids(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(Pyramid(width, width, is_residual=True) for _ in range(depth)))


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, dilation: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=False,
    )


def _double(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2, bias=False)


def _norm_act(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels, eps=NORM_EPSILON), nn.PReLU(channels))
