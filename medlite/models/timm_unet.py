"""A U-Net whose encoder is any network of timm."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.sizes import require_size, require_spatial_dims
from medlite.models.layers.timm_networks import (
    create_timm_network,
    grid_of,
    has_fixed_size,
    merge_branches,
)

MULTIPLE = 32
"""Sides are padded to multiples of this, the coarsest reduction of almost all encoders."""


class TimmUNet(nn.Module):
    """Ronneberger et al., "U-Net", arXiv 1505.04597, on the feature maps of a timm network.

    Each step of the decoder enlarges the features to the next finer map of the encoder (nearest
    neighbour, which 8-bit runtimes compute exactly), appends that map and convolves twice.
    Images of any size are padded to multiples of 32 and their logits cropped.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits of each pixel.
        encoder: a timm network that gives feature maps of several scales.
        decoder_channels: of the decoder's steps from coarse to fine; as many are used as the
            encoder has maps, less one.
        image_size: (H, W), for encoders with a fixed grid.
        pretrained: start the encoder from timm's weights.
        arguments: what else the encoder's constructor takes.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        encoder: str = "mobilenetv3_small_100",
        decoder_channels: tuple[int, ...] = (64, 48, 32, 16),
        image_size: tuple[int, ...] | None = None,
        pretrained: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        padded_size = grid_of(image_size, model="timm_unet", multiple=MULTIPLE)
        self.encoder = create_timm_network(
            encoder,
            key="model.encoder",
            in_channels=in_channels,
            image_size=padded_size,
            pretrained=pretrained,
            features_only=True,
            **arguments,
        )
        self.fixed_size = padded_size if has_fixed_size(encoder) else None
        maps: Any = self.encoder.feature_info
        reductions = maps.reduction()
        if len(set(reductions)) < 2 or sorted(set(reductions)) != reductions:
            problem = f"model.encoder: '{encoder}' has no feature maps of several scales"
            raise ConfigError([problem])
        *skips, width = maps.channels()
        if len(decoder_channels) < len(skips):
            problem = (
                f"model.decoder_channels: '{encoder}' needs {len(skips)} widths, "
                f"got {len(decoder_channels)}"
            )
            raise ConfigError([problem])
        self.decoder = nn.ModuleList()
        for skip, out_channels in zip(reversed(skips), decoder_channels, strict=False):
            self.decoder.append(_DecoderStep(width + skip, out_channels))
            width = out_channels
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        require_spatial_dims(images, model="timm_unet", spatial_dims=2)
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
        if self.fixed_size is not None:
            require_size(padded, model="timm_unet", size=self.fixed_size)
        *skips, features = self.encoder(padded)
        for step, skip in zip(self.decoder, reversed(skips), strict=True):
            features = step(features, skip)
        logits = self.head(features)
        logits = F.interpolate(logits, size=padded.shape[2:], mode="bilinear")
        return logits[:, :, :height, :width]

    def deploy(self) -> TimmUNet:
        """A copy with merged branches, for evaluation only: the same function, faster."""
        return merge_branches(self)


class _DecoderStep(nn.Module):
    """Enlarge, append, convolve twice."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *_conv_norm_act(in_channels, out_channels), *_conv_norm_act(out_channels, out_channels)
        )

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        enlarged = F.interpolate(features, size=skip.shape[2:], mode="nearest")
        return self.convs(torch.cat([enlarged, skip], dim=1))


def _conv_norm_act(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()
