"""An asymmetric hybrid for volumes: scans within slices, then light convolutions across them."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from medlite.models.layers.sizes import check_scales, require_divisible_slices
from medlite.models.layers.ss2d import VSSBlock
from medlite.models.layers.ssm import S6, Ssm

NUM_GROUPS = 8


class SliceMambaUNet(nn.Module):
    """A 2-D state-space encoder of slices and a light 3-D decoder; of no paper, a design of ours.

    It follows the 3D Anisotropic Hybrid Network (Liu et al., arXiv 1711.08580), whose encoder
    sees single slices and whose decoder sees the volume: slices of CT and MRI are often some
    times thicker than their pixels are wide, and are what a small network learns most from.
    All else is chosen here:

    - the slices are folded into the batch, so one set of 2-D weights serves all of them, and
      the encoder halves height and width but never the depth;
    - convolutions at the two finest scales, the blocks of VM-UNet (SS2D, four directions; Ruan
      et al., arXiv 2402.02491) at the two coarsest, where a scan reaches furthest and costs least;
    - at every scale, depth-wise convolutions of 5 slices gather what the encoder said of each;
    - a decoder of additive skip connections and separable 3x3x3 convolutions, as in LightM-UNet
      (arXiv 2403.05246);
    - the widths and depths: the defaults have 590,529 parameters for 1 channel and 1 class, and
      at 64x64x32 2.25 GMACs and 1.84 GFLOPs of scans.

    Height and width are divisible by 2 for each scale but the first, the depth is free.

    Args:
        in_channels: channels of the volumes.
        num_classes: K, logits of each voxel.
        widths: C, channels at each scale from fine to coarse, divisible by 8.
        depths: blocks of the encoder at each scale; with 0 a convolution alone.
        ssm: the recurrence of the scans.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (16, 32, 64, 128),
        depths: tuple[int, ...] = (0, 0, 2, 2),
        ssm: Ssm = S6,
    ) -> None:
        super().__init__()
        check_scales(widths, depths, divisor=NUM_GROUPS)
        self.encoder = SliceEncoder(in_channels, widths, depths, ssm)
        self.mixers = nn.ModuleList(_DepthMixer(width) for width in widths)
        self.decoders = nn.ModuleList(
            _DecoderLevel(coarse, width)
            for coarse, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv3d(widths[0], num_classes, kernel_size=1)

    def forward(self, volumes: Tensor) -> Tensor:
        """(B, C, H, W, D) -> logits (B, K, H, W, D)."""
        divisor = 2 ** (len(self.mixers) - 1)
        require_divisible_slices(volumes, model="slice_mamba_unet", divisor=divisor)
        scales = self.encoder(volumes)
        skips = [mixer(scale) for mixer, scale in zip(self.mixers, scales, strict=True)]
        features = skips.pop()
        for decoder in self.decoders:
            features = decoder(features, skips.pop())
        return self.head(features)


class SliceEncoder(nn.Module):
    """Features of every slice at every scale; slices do not see each other.

    Args:
        in_channels: channels of the volumes.
        widths: C, channels at each scale from fine to coarse.
        depths: blocks at each scale.
        ssm: the recurrence of the scans.
    """

    def __init__(
        self, in_channels: int, widths: tuple[int, ...], depths: tuple[int, ...], ssm: Ssm
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            _SliceStage(fine, width, depth, ssm, stride=1 if index == 0 else 2)
            for index, (fine, width, depth) in enumerate(
                zip((in_channels, *widths), widths, depths, strict=False)
            )
        )

    def forward(self, volumes: Tensor) -> list[Tensor]:
        """(B, C, H, W, D) -> from fine to coarse (B, C', H', W', D)."""
        depth = volumes.shape[4]
        maps = volumes.permute(0, 4, 1, 2, 3).flatten(0, 1)
        scales = []
        for stage in self.stages:
            maps = stage(maps)
            scales.append(maps.unflatten(0, (-1, depth)).permute(0, 2, 3, 4, 1))
        return scales


class _SliceStage(nn.Module):
    """(B D, C, H, W) -> (B D, C', H', W'): a convolution, and blocks of scans."""

    def __init__(self, in_channels: int, width: int, depth: int, ssm: Ssm, *, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False
        )
        self.norm = nn.GroupNorm(NUM_GROUPS, width)
        self.blocks = nn.Sequential(*(VSSBlock(width, 0.0, ssm) for _ in range(depth)))

    def forward(self, maps: Tensor) -> Tensor:
        maps = F.gelu(self.norm(self.conv(maps)))
        return self.blocks(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _DepthMixer(nn.Module):
    """What five slices around each one say at the same pixel, added to its own features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NUM_GROUPS, width)
        self.conv = _separable(width, (1, 1, 5))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv(F.gelu(self.norm(features)))


class _DecoderLevel(nn.Module):
    """Twice the height and width at the next width, the skip added, one convolution."""

    def __init__(self, coarse_width: int, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv3d(coarse_width, width, kernel_size=1, bias=False)
        self.norm = nn.GroupNorm(NUM_GROUPS, width)
        self.conv = _separable(width, (3, 3, 3))

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        scale = (2.0, 2.0, 1.0)
        upsampled = F.interpolate(self.reduce(features), scale_factor=scale, mode="trilinear")
        features = upsampled + skip
        return features + self.conv(F.gelu(self.norm(features)))


def _separable(width: int, kernel_size: tuple[int, int, int]) -> nn.Sequential:
    """A depth-wise convolution (H, W, D) and a point-wise one."""
    height, breadth, depth = (side // 2 for side in kernel_size)
    padding = (height, breadth, depth)
    return nn.Sequential(
        nn.Conv3d(width, width, kernel_size, padding=padding, groups=width, bias=False),
        nn.Conv3d(width, width, kernel_size=1, bias=False),
    )
