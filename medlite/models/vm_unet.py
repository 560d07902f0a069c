"""VM-UNet: a U of 2-D selective scans, without a convolution between its first and last."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.drop_path import rising_rates
from medlite.models.layers.initialization import draw_linear_layers
from medlite.models.layers.patches import PATCH_SIDE, PatchEmbed, PatchExpanding, PatchMerging
from medlite.models.layers.sizes import require_divisible_sides
from medlite.models.layers.ss2d import VSSBlock
from medlite.models.layers.ssm import S6, Ssm


class VMUNet(nn.Module):
    """Ruan et al., "VM-UNet: Vision Mamba UNet for Medical Image Segmentation", arXiv 2402.02491.

    Patches of 4x4, blocks of 2-D selective scans at four scales with patch merging between them,
    and the same way back with patch expanding. The maps that enter the encoder's stages are
    added on the way back, but for the finest, which the published code leaves unused. As that
    code builds it with the depths below: 27,427,561 parameters for 3 channels and 1 class, 5.29
    GMACs and 2.99 GFLOPs of scans at 256x256 (its default depths, 2-2-9-2 and 2-9-2-2, give
    44 M). Two differences: logits are returned instead of probabilities, and channel counts
    other than 3 are embedded as they are, but for 1, which is repeated three times as published.
    Sides are divisible by 32.

    Args:
        in_channels: channels of the images.
        num_classes: K, logits of each pixel.
        width: C, channels of the finest scale; each coarser one doubles them.
        depths: blocks of the encoder at each scale, from fine to coarse.
        depths_decoder: blocks of the decoder at each scale, from coarse to fine.
        drop_path_rate: of the last block of the encoder and the first of the decoder.
        ssm: the recurrence of the scans.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        width: int = 96,
        depths: tuple[int, ...] = (2, 2, 2, 2),
        depths_decoder: tuple[int, ...] = (2, 2, 2, 1),
        drop_path_rate: float = 0.2,
        ssm: Ssm = S6,
    ) -> None:
        super().__init__()
        if len(depths_decoder) != len(depths):
            problem = (
                f"model.depths_decoder: {len(depths_decoder)} scales do not go with the "
                f"{len(depths)} of model.depths"
            )
            raise ConfigError([problem])
        widths = [width * 2**scale for scale in range(len(depths))]
        self.num_repeats = 3 if in_channels == 1 else 1
        self.patch_embed = PatchEmbed(in_channels * self.num_repeats, width)
        self.layers = nn.ModuleList(
            _EncoderStage(width, rates, ssm, halves=width < widths[-1])
            for width, rates in zip(widths, rising_rates(drop_path_rate, depths), strict=True)
        )
        falling = [rates[::-1] for rates in rising_rates(drop_path_rate, depths_decoder[::-1])]
        self.layers_up = nn.ModuleList(
            _DecoderStage(width, rates, ssm, doubles=width < widths[-1])
            for width, rates in zip(widths[::-1], falling[::-1], strict=True)
        )
        self.final_up = PatchExpanding(width, width // PATCH_SIDE, scale=PATCH_SIDE)
        self.final_conv = nn.Conv2d(width // PATCH_SIDE, num_classes, kernel_size=1)
        draw_linear_layers(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        divisor = PATCH_SIDE * 2 ** (len(self.layers) - 1)
        require_divisible_sides(images, model="vm_unet", divisor=divisor, spatial_dims=2)
        maps = self.patch_embed(images.repeat(1, self.num_repeats, 1, 1))
        skips = []
        for layer in self.layers:
            skips.append(maps)
            maps = layer(maps)
        bottom, *rest = self.layers_up
        maps = bottom(maps)
        for layer in rest:
            maps = layer(maps + skips.pop())
        return self.final_conv(self.final_up(maps).permute(0, 3, 1, 2))


class _EncoderStage(nn.Module):
    """Blocks, then (but for the coarsest) half the size and twice the channels."""

    def __init__(self, width: int, rates: tuple[float, ...], ssm: Ssm, *, halves: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(VSSBlock(width, rate, ssm) for rate in rates))
        self.downsample = PatchMerging(width) if halves else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        return self.downsample(self.blocks(maps))


class _DecoderStage(nn.Module):
    """Twice the size and half the channels (but for the coarsest), then blocks."""

    def __init__(self, width: int, rates: tuple[float, ...], ssm: Ssm, *, doubles: bool) -> None:
        super().__init__()
        self.upsample = PatchExpanding(2 * width, width, scale=2) if doubles else nn.Identity()
        self.blocks = nn.Sequential(*(VSSBlock(width, rate, ssm) for rate in rates))

    def forward(self, maps: Tensor) -> Tensor:
        return self.blocks(self.upsample(maps))
