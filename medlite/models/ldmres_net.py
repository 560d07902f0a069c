"""LDMRes-Net in style: a small U of blocks with two convolutional paths and a shortcut."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.models.layers.sizes import require_divisible_sides


class LDMResNet(nn.Module):
    """LDMRes-Net-style, after Iqbal et al., "LDMRes-Net: Enabling Efficient Medical Image [...]".

    "[...] Segmentation on IoT and Edge Platforms", arXiv 2306.06145. It has no published code and
    its widths and kernels are not known to us, so no result of the paper can be claimed for this
    network. From the paper: an encoder and a decoder of "dual multiscale residual" blocks for
    retinal images, 0.072 M parameters, few filters. Ours are these choices:

    - a block's two paths, 3x3-3x3 and 1x1-3x3, their sum, and the 1x1 shortcut of every block;
    - batch normalisation, ReLU, and no bias before a normalisation;
    - max pooling, bilinear upsampling, concatenated skip connections, a 1x1 head;
    - four scales of 8, 16, 20 and 28 channels, which come near the paper's size.

    71,329 parameters for 3 channels and 1 class, 4.52 GMACs at 640x640. Sides are divisible by 2
    per scale below the first, 8 by default.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits of each pixel.
        widths: channels at the scales, from the finest.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (8, 16, 20, 28),
    ) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.stem = DualMultiscaleBlock(in_channels, widths[0])
        self.encoders = nn.ModuleList(DualMultiscaleBlock(fine, coarse) for fine, coarse in pairs)
        self.decoders = nn.ModuleList(
            DualMultiscaleBlock(coarse + fine, fine) for fine, coarse in reversed(pairs)
        )
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)
        self.divisor = 2 ** len(pairs)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        require_divisible_sides(images, model="ldmres_net", divisor=self.divisor, spatial_dims=2)
        scales = [self.stem(images)]
        for encoder in self.encoders:
            scales.append(encoder(F.max_pool2d(scales[-1], 2)))
        features = scales.pop()
        for decoder in self.decoders:
            upsampled = F.interpolate(features, scale_factor=2, mode="bilinear")
            features = decoder(torch.cat([upsampled, scales.pop()], dim=1))
        return self.head(features)


class DualMultiscaleBlock(nn.Module):
    """Two paths that see 5x5 and 3x3 pixels, added to the input.

    Args:
        in_channels: C.
        out_channels: C'.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.wide = _path(in_channels, out_channels, first_kernel_size=3)
        self.narrow = _path(in_channels, out_channels, first_kernel_size=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return F.relu(self.wide(features) + self.narrow(features) + self.shortcut(features))


def _path(in_channels: int, out_channels: int, *, first_kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels, out_channels, first_kernel_size, padding=first_kernel_size // 2, bias=False
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )
