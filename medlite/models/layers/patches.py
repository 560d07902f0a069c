"""Patches as tokens on a map (B, H, W, C): embedding, merging and expanding them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

PATCH_SIDE = 4
"""Pixels of a patch along each side."""


class PatchEmbed(nn.Module):
    """Dosovitskiy et al., arXiv 2010.11929, equation 1, on patches of 4x4 and normalised.

    Args:
        in_channels: of the images.
        width: C, channels of the tokens.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=PATCH_SIDE, stride=PATCH_SIDE)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C', 4H, 4W) -> (B, H, W, C)."""
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Liu et al., "Swin Transformer", arXiv 2103.14030, section 3.1: 2x2 tokens become one.

    Odd sides get a row or column of zeros, as in Swin; VM-UNet and MedMamba cut one off.

    Args:
        width: C; the result has 2C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2C)."""
        _, height, width, _ = maps.shape
        if height % 2 or width % 2:
            maps = F.pad(maps, (0, 0, 0, width % 2, 0, height % 2))
        squares = maps.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        merged = squares.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(merged))


class PatchExpanding(nn.Module):
    """Cao et al., "Swin-Unet", arXiv 2105.05537, section 3.4: one token becomes a square of them.

    Args:
        width: C.
        out_width: channels of each new token.
        scale: new tokens along each side of the square.
    """

    def __init__(self, width: int, out_width: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(width, scale**2 * out_width, bias=False)
        self.norm = nn.LayerNorm(out_width)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, scale H, scale W, C')."""
        squares = self.expand(maps).unflatten(3, (self.scale, self.scale, -1))
        return self.norm(squares.transpose(2, 3).flatten(3, 4).flatten(1, 2))
