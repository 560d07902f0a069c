"""LeViT-UNet: a U-Net with a convolutional decoder behind LeViT's convolutions and attention."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.levit import (
    Grid,
    LevitAttention,
    Residual,
    ShrinkingAttention,
    levit_mlp,
    shrunk,
)
from medlite.models.layers.sizes import require_divisible_sides, require_size

NAME = "levit_unet"
PUBLISHED_SIZE = (224, 224)
STEM_STRIDE = 16
NUM_STAGES = 3
MLP_RATIO = 2
VALUE_RATIO, SHRINKING_VALUE_RATIO = 2, 4


class LeViTUNet(nn.Module):
    """Xu et al., arXiv 2107.08623, as the published code builds it.

    "LeViT-UNet: Make Faster Encoders with Transformer for Medical Image Segmentation". Four
    convolutions that halve the maps, three stages of LeViT's attention; all stages enlarged and
    joined with the last convolution; a decoder that enlarges thrice and joins the other
    convolutions. The head works at half the size, its logits are enlarged by 2. For 1 channel
    and 9 classes at 224x224:

    - 128s, the defaults: 15,904,715 parameters, 17.56 GMACs, nearly all in the decoder;
    - 192, widths 192-288-384, depths 4-4-4, heads 3-5-6 of 32: 19,904,670 parameters,
      18.96 GMACs;
    - 384, widths 384-512-768, depths 4-4-4, heads 6-9-12 of 32: 52,166,029 parameters,
      25.64 GMACs.

    The biases of attention belong to places of a grid, so a network is built for one size and
    takes no other; that code knows 224x224 only. Sides are divisible by 16.

    Args:
        in_channels: channels of the images.
        num_classes: K, logits of each pixel.
        image_size: (H, W) of the images; None is the published 224x224.
        widths: channels of the three stages; the first is divisible by 8, the first two by
            `key_dim`.
        depths: attention layers of each stage, besides those that shrink.
        num_heads: of each stage.
        key_dim: channels of a head's queries and keys.
        decoder_widths: channels of the three decoder stages.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, ...] | None = None,
        widths: tuple[int, ...] = (128, 256, 384),
        depths: tuple[int, ...] = (2, 3, 4),
        num_heads: tuple[int, ...] = (4, 6, 8),
        key_dim: int = 16,
        decoder_widths: tuple[int, ...] = (512, 256, 128),
    ) -> None:
        super().__init__()
        _check(widths, depths, num_heads, key_dim, decoder_widths)
        self.image_size = tuple(image_size or PUBLISHED_SIZE)
        self.grids = _grids(self.image_size)
        stem_widths = [widths[0] // divisor for divisor in (8, 4, 2, 1)]
        self.stem = nn.ModuleList()
        for channels, stem_width in zip([in_channels, *stem_widths], stem_widths, strict=False):
            self.stem.append(_conv_norm(channels, stem_width, stride=2))
        self.stages = nn.ModuleList()
        for stage, grid in enumerate(self.grids):
            blocks: list[nn.Module] = []
            if stage:
                before = widths[stage - 1], self.grids[stage - 1]
                blocks += _shrinking(*before, widths[stage], key_dim)
            for _ in range(depths[stage]):
                blocks += _attending(widths[stage], grid, num_heads[stage], key_dim)
            self.stages.append(nn.Sequential(*blocks))
        self.decoders = nn.ModuleList()
        channels = widths[0] + sum(widths)
        for width, skip_width in zip(decoder_widths, stem_widths[2::-1], strict=True):
            self.decoders.append(_Decoder(channels, width))
            channels = width + skip_width
        self.head = nn.Conv2d(channels, num_classes, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        require_size(images, model=NAME, size=self.image_size)
        *early, last = self.stem
        features, skips = images, []
        for convolution in early:
            features = F.hardswish(convolution(features))
            skips.append(features)
        features = last(features)
        features = torch.cat([features, *self._attend(features)], dim=1)
        for decoder, skip in zip(self.decoders, reversed(skips), strict=True):
            features = torch.cat([decoder(features), skip], dim=1)
        return _enlarge(self.head(features))

    def _attend(self, features: Tensor) -> list[Tensor]:
        """The maps of the three stages, all at the size of the first."""
        tokens = features.flatten(2).transpose(1, 2)
        maps = []
        for times, (stage, grid) in enumerate(zip(self.stages, self.grids, strict=True)):
            tokens = stage(tokens)
            enlarged = tokens.transpose(1, 2).unflatten(2, grid)
            for _ in range(times):
                enlarged = _enlarge(enlarged)
            maps.append(_fit(enlarged, self.grids[0]))
        return maps


class _Decoder(nn.Module):
    """Features at twice the size, convolved twice."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm(in_channels, out_channels)
        self.conv2 = _conv_norm(out_channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(_enlarge(features)))))


def _attending(width: int, grid: Grid, num_heads: int, key_dim: int) -> list[nn.Module]:
    attention = LevitAttention(
        width, num_heads=num_heads, key_dim=key_dim, value_ratio=VALUE_RATIO, grid=grid
    )
    return [Residual(attention), levit_mlp(width, MLP_RATIO)]


def _shrinking(in_width: int, grid: Grid, out_width: int, key_dim: int) -> list[nn.Module]:
    attention = ShrinkingAttention(
        in_width,
        out_width,
        num_heads=in_width // key_dim,
        key_dim=key_dim,
        value_ratio=SHRINKING_VALUE_RATIO,
        grid=grid,
    )
    return [attention, levit_mlp(out_width, MLP_RATIO)]


def _conv_norm(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _enlarge(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=True)


def _fit(features: Tensor, grid: Grid) -> Tensor:
    """What was rounded up while shrinking has become larger than the grid it came from."""
    if tuple(features.shape[2:]) == grid:
        return features
    return F.interpolate(features, size=grid, mode="bilinear", align_corners=True)


def _grids(image_size: tuple[int, ...]) -> list[Grid]:
    """(H, W) of the tokens of the three stages."""
    images = torch.empty(1, 1, *image_size, device="meta")
    require_divisible_sides(images, model=NAME, divisor=STEM_STRIDE, spatial_dims=2)
    height, width = image_size
    grids = [(height // STEM_STRIDE, width // STEM_STRIDE)]
    while len(grids) < NUM_STAGES:
        grids.append(shrunk(grids[-1]))
    return grids


def _check(
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    key_dim: int,
    decoder_widths: tuple[int, ...],
) -> None:
    given = {
        "widths": widths,
        "depths": depths,
        "num_heads": num_heads,
        "decoder_widths": decoder_widths,
    }
    problems = [
        f"model.{key}: {list(values)} are not of three stages"
        for key, values in given.items()
        if len(values) != NUM_STAGES
    ]
    problems += [
        f"model.widths: {width} is not divisible by model.key_dim={key_dim}, "
        "so the shrinking attention cannot have heads of it"
        for width in widths[:-1]
        if width % key_dim
    ]
    if widths and widths[0] % 8:
        problems.append(f"model.widths: {widths[0]} is not divisible by 8, as the stem needs it")
    if problems:
        raise ConfigError(problems)
