"""LightM-UNet: a U-Net whose encoder is made of residual Mamba layers, in 2D and 3D."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.mamba import mamba_block
from medlite.models.layers.sizes import require_divisible_sides
from medlite.models.layers.ssm import S6, Ssm

NUM_GROUPS = 8


class LightMUNet(nn.Module):
    """Liao et al., "LightM-UNet: Mamba Assists in Lightweight UNet for Medical Image Segmentation".

    arXiv 2403.05246, as the published code builds it: 5,011,683 parameters for 1 channel and
    2 classes, not the 1.09 M of the paper's table 2, which a hook-based counter found because
    the fused Mamba never calls the layers that hold its weights. A network of 1.08 M is had
    with `init_filters=16, blocks_down=(1, 2, 2, 3)`. The scan runs once, in row-major order.
    Sides are divisible by 2 for each level but the first.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits of each pixel.
        spatial_dims: 2 or 3.
        init_filters: channels of the first level, divisible by 8; each level doubles them.
        blocks_down: residual Mamba blocks of each level of the encoder.
        ssm: the recurrence of the scans.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        spatial_dims: Literal[2, 3] = 2,
        init_filters: int = 32,
        blocks_down: tuple[int, ...] = (1, 2, 2, 4),
        ssm: Ssm = S6,
    ) -> None:
        super().__init__()
        if init_filters % NUM_GROUPS:
            problem = f"model.init_filters: {init_filters} is not divisible by {NUM_GROUPS}"
            raise ConfigError([problem])
        self.spatial_dims = spatial_dims
        widths = [init_filters * 2**level for level in range(len(blocks_down))]
        self.stem = _separable(spatial_dims, in_channels, init_filters)
        self.encoders = nn.ModuleList(
            _EncoderLevel(spatial_dims, width, num_blocks, ssm, halves=level > 0)
            for level, (width, num_blocks) in enumerate(zip(widths, blocks_down, strict=True))
        )
        self.decoders = nn.ModuleList(
            _DecoderLevel(spatial_dims, width) for width in reversed(widths[:-1])
        )
        self.head = nn.Sequential(
            _group_norm(init_filters),
            nn.ReLU(),
            _separable(spatial_dims, init_filters, num_classes, kernel_size=1, bias=True),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W[, D]) -> logits (B, K, H, W[, D])."""
        require_divisible_sides(
            images,
            model="lightm_unet",
            divisor=2 ** (len(self.encoders) - 1),
            spatial_dims=self.spatial_dims,
        )
        features = self.stem(images)
        skips = []
        for encoder in self.encoders:
            features = encoder(features)
            skips.append(features)
        for decoder, skip in zip(self.decoders, reversed(skips[:-1]), strict=True):
            features = decoder(features, skip)
        return self.head(features)


class ResidualMamba(nn.Module):
    """The residual vision Mamba layer (RVM): Mamba beside a scaled identity, then a projection.

    The same normalisation stands before the Mamba and after the sum; the identity is not
    normalised.

    Args:
        in_channels: channels of the features.
        out_channels: channels of the result.
        ssm: the recurrence of the scan.
    """

    def __init__(self, in_channels: int, out_channels: int, ssm: Ssm = S6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.mamba = mamba_block(in_channels, ssm)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(in_channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W[, D]) -> (B, C', H, W[, D])."""
        size = features.shape[2:]
        tokens = features.flatten(2).transpose(1, 2)
        mixed = self.mamba(self.norm(tokens)) + self.skip_scale * tokens
        return self.proj(self.norm(mixed)).transpose(1, 2).unflatten(2, size)


class _EncoderLevel(nn.Sequential):
    """Halves the size and doubles the channels (but for the first level), then mixes."""

    def __init__(
        self, spatial_dims: int, width: int, num_blocks: int, ssm: Ssm, *, halves: bool
    ) -> None:
        pool = nn.MaxPool2d(2) if spatial_dims == 2 else nn.MaxPool3d(2)
        down = [ResidualMamba(width // 2, width, ssm), pool] if halves else []
        super().__init__(*down, *(_ResidualBlock(width, ssm) for _ in range(num_blocks)))


class _ResidualBlock(nn.Module):
    """Two pre-activated Mamba layers and the identity."""

    def __init__(self, width: int, ssm: Ssm) -> None:
        super().__init__()
        layers = [
            (_group_norm(width), nn.ReLU(), ResidualMamba(width, width, ssm)) for _ in range(2)
        ]
        self.body = nn.Sequential(*(module for layer in layers for module in layer))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features)


class _DecoderLevel(nn.Module):
    """Half the channels at twice the size, the encoder's features added, one convolution."""

    def __init__(self, spatial_dims: int, width: int) -> None:
        super().__init__()
        self.mode = "bilinear" if spatial_dims == 2 else "trilinear"
        self.reduce = _conv(spatial_dims)(2 * width, width, kernel_size=1, bias=False)
        self.norm = _group_norm(width)
        self.conv = _separable(spatial_dims, width, width)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.norm_out = _group_norm(width)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        upsampled = F.interpolate(self.reduce(features), scale_factor=2, mode=self.mode)
        features = upsampled + skip
        features = self.conv(F.relu(self.norm(features))) + self.skip_scale * features
        return F.relu(self.norm_out(features))


def _separable(
    spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = False
) -> nn.Sequential:
    """A depth-wise convolution and a point-wise one."""
    conv = _conv(spatial_dims)
    depthwise = conv(
        in_channels,
        in_channels,
        kernel_size,
        padding=kernel_size // 2,
        groups=in_channels,
        bias=bias,
    )
    return nn.Sequential(depthwise, conv(in_channels, out_channels, kernel_size=1, bias=bias))


def _conv(spatial_dims: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    return nn.Conv2d if spatial_dims == 2 else nn.Conv3d


def _group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(NUM_GROUPS, width)
