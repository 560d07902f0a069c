"""A network in the style of Light-VM2D-UNet: a light U whose mixer is a wavefront scan."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from medlite.models.layers.mamba2d import Mamba2D
from medlite.models.layers.sizes import check_scales, require_divisible_sides

NUM_GROUPS = 8


class LightVM2DUNet(nn.Module):
    """Light-VM2D-UNet-style: no code and no weights of that network are public.

    What is known of it, from one sentence of a review, is a light U-Net that mixes pixels by
    Mamba2D (Baty et al., arXiv 2412.16146) instead of scans in several directions. All else is
    chosen here:

    - convolutions at the two finest scales, Mamba2D at the three coarsest, as in UltraLight
      VM-UNet (arXiv 2403.20035): a scan takes H + W - 1 steps, so the fine scales cost most;
    - blocks are normalised before and residual, without an MLP, since the local path of Mamba2D
      has one; every second block reads backwards, so that two blocks see the whole map;
    - a decoder of additive skip connections and separable convolutions, as in LightM-UNet
      (arXiv 2403.05246);
    - widths and depths: the defaults have 144,853 parameters for 3 channels and 1 class, and
      at 256x256 0.27 GMACs and 0.10 GFLOPs of scans.

    Sides are divisible by 2 for each scale but the first.

    Args:
        in_channels: channels of the images.
        num_classes: K, logits of each pixel.
        widths: C, channels at each scale from fine to coarse, divisible by 8.
        depths: blocks of the encoder at each scale; with 0 a convolution alone.
        d_state: N, states of each channel.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (16, 24, 32, 48, 64),
        depths: tuple[int, ...] = (0, 0, 2, 2, 2),
        d_state: int = 16,
    ) -> None:
        super().__init__()
        check_scales(widths, depths, divisor=NUM_GROUPS)
        self.encoders = nn.ModuleList(
            _EncoderLevel(fine, width, depth, d_state)
            for fine, width, depth in zip((in_channels, *widths), widths, depths, strict=False)
        )
        self.decoders = nn.ModuleList(
            _DecoderLevel(coarse, width)
            for coarse, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        divisor = 2 ** (len(self.encoders) - 1)
        require_divisible_sides(images, model="light_vm2d_unet", divisor=divisor, spatial_dims=2)
        first, *rest = self.encoders
        skips = [first(images)]
        for encoder in rest:
            skips.append(encoder(F.max_pool2d(skips[-1], 2)))
        features = skips.pop()
        for decoder in self.decoders:
            features = decoder(features, skips.pop())
        return self.head(features)


class _EncoderLevel(nn.Module):
    """A convolution to the level's width, then blocks that read forwards and backwards in turn.

    The convolution is 1x1 before blocks, which have 3x3 ones of their own, and 3x3 without any.
    """

    def __init__(self, in_channels: int, width: int, depth: int, d_state: int) -> None:
        super().__init__()
        side = 1 if depth else 3
        self.conv = nn.Conv2d(in_channels, width, side, padding=side // 2, bias=False)
        self.norm = nn.GroupNorm(NUM_GROUPS, width)
        self.blocks = nn.Sequential(
            *(_Block(width, d_state, reads_backwards=index % 2 == 1) for index in range(depth))
        )

    def forward(self, features: Tensor) -> Tensor:
        features = F.gelu(self.norm(self.conv(features)))
        return self.blocks(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Block(nn.Module):
    """(B, H, W, C) -> (B, H, W, C), residual."""

    def __init__(self, width: int, d_state: int, *, reads_backwards: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mixer = Mamba2D(width, d_state, reads_backwards=reads_backwards)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.mixer(self.norm(maps))


class _DecoderLevel(nn.Module):
    """Twice the size at the next width, the encoder's features added, one convolution."""

    def __init__(self, coarse_width: int, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(coarse_width, width, kernel_size=1, bias=False)
        self.norm = nn.GroupNorm(NUM_GROUPS, width)
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, bias=False),
            nn.Conv2d(width, width, kernel_size=1, bias=False),
        )

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        upsampled = F.interpolate(self.reduce(features), scale_factor=2, mode="bilinear")
        features = upsampled + skip
        return features + self.conv(F.gelu(self.norm(features)))
