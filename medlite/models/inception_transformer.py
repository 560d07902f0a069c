"""Inception transformer: convolution, pooling and attention side by side in every mixer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import ConfigError, ShapeError
from medlite.models.layers.drop_path import DropPath, rising_rates
from medlite.models.layers.initialization import STANDARD_DEVIATION, draw_linear_layers
from medlite.models.layers.sizes import by, check_scales, require_spatial_dims

PUBLISHED_SIZE = (224, 224)
ATTENTION_HEADS = (1, 1, 1, 3, 3, 3, 7, 7, 7, 7, 9, 9, 9, 9, 9, 11, 11, 11)

HEAD_WIDTH = 32
MLP_RATIO = 4
NUM_FINE_STAGES = 2
"""Their attention is among means of 2x2 pixels; the stages after them scale their branches."""

BRANCH_SCALE = 1e-6
EPS = 1e-6


class InceptionTransformer(nn.Module):
    """Si et al., "Inception Transformer", arXiv 2205.12956 (iFormer; timm's is another network).

    Four stages of blocks whose mixers split the channels: at first most go to convolution and
    max-pooling (high frequencies) and few to attention (low ones), at last the other way round.
    The defaults are iFormer-S: 19,866,344 parameters for 3 channels and 1000 classes, 4.83 GMACs
    at 224x224. B, 47.87 M, has widths 96-192-384-512, depths 4-6-14-6 and heads 1 | 3 | 8 and,
    from the middle, 10 | 15. The same function as the published code, which takes maps that are
    even and square. Any size is taken: sides are halved rounding up, attention among means of 2x2
    repeats the last row or column of an odd map, and position embeddings are interpolated
    (bilinear) where the image is not of `image_size`.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits.
        widths: channels of each stage, divisible by 32.
        depths: blocks of each stage.
        attention_heads: of each block, from the first; each takes 32 channels, and one more 32 at
            least are left to the high frequencies.
        drop_path_rate: of the last block.
        image_size: (H, W) that the position embeddings are built for; None is 224x224.

    Raises:
        ConfigError: widths, depths and heads that do not go together.
        ShapeError: an image size of volumes.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int] = (96, 192, 320, 384),
        depths: Sequence[int] = (3, 3, 9, 3),
        attention_heads: Sequence[int] = ATTENTION_HEADS,
        drop_path_rate: float = 0.2,
        image_size: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        sides = PUBLISHED_SIZE if image_size is None else image_size
        _check(widths, depths, attention_heads, sides)
        heads, rates = iter(attention_heads), rising_rates(drop_path_rate, tuple(depths))
        self.stages = nn.Sequential()
        for stage, (width, depth, stage_rates) in enumerate(
            zip(widths, depths, rates, strict=True)
        ):
            is_fine = stage < NUM_FINE_STAGES
            stride = 4 * 2**stage
            patch_embed = _halving(widths[stage - 1], width) if stage else _stem(in_channels, width)
            blocks = [
                InceptionBlock(width, num_heads, rate, is_fine=is_fine)
                for num_heads, rate in zip(itertools.islice(heads, depth), stage_rates, strict=True)
            ]
            grid = [-(-side // stride) for side in sides]
            self.stages.append(_Stage(patch_embed, torch.zeros(1, *grid, width), blocks))
        self.norm = nn.LayerNorm(widths[-1], eps=EPS)
        self.head = nn.Linear(widths[-1], num_classes)
        draw_linear_layers(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        require_spatial_dims(images, model="inception_transformer", spatial_dims=2)
        maps = self.stages(images).permute(0, 2, 3, 1)
        return self.head(self.norm(maps).mean((1, 2)))


class InceptionBlock(nn.Module):
    """An inception mixer and an MLP, both normalised before and residual.

    Args:
        width: C, channels.
        num_heads: of the attention.
        drop_path_rate: of both branches.
        is_fine: attention is among means of 2x2 pixels, and branches are not scaled.
    """

    def __init__(self, width: int, num_heads: int, drop_path_rate: float, *, is_fine: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = InceptionMixer(width, num_heads, is_fine=is_fine)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width)
        )
        self.scale1 = nn.Identity() if is_fine else _Scale(width)
        self.scale2 = nn.Identity() if is_fine else _Scale(width)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        maps = maps + self.drop_path(self.scale1(self.attn(self.norm1(maps))))
        return maps + self.drop_path(self.scale2(self.mlp(self.norm2(maps))))


class InceptionMixer(nn.Module):
    """High and low frequencies apart, then joined and fused (section 3.1).

    Args:
        width: C, channels.
        num_heads: heads of 32 channels that attend; the other channels convolve and pool.
        is_fine: attention is among means of 2x2 pixels.
    """

    def __init__(self, width: int, num_heads: int, *, is_fine: bool) -> None:
        super().__init__()
        low = num_heads * HEAD_WIDTH
        high = width - low
        joined = 2 * high + low
        self.widths = (high, low)
        self.high_mixer = HighMixer(high)
        self.low_mixer = LowMixer(low, num_heads, is_pooled=is_fine)
        self.conv_fuse = nn.Conv2d(
            joined, joined, kernel_size=3, padding=1, groups=joined, bias=False
        )
        self.proj = nn.Conv2d(joined, width, kernel_size=1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        high, low = maps.permute(0, 3, 1, 2).split(self.widths, dim=1)
        joined = torch.cat([self.high_mixer(high), self.low_mixer(low)], dim=1)
        return self.proj(joined + self.conv_fuse(joined)).permute(0, 2, 3, 1)


class HighMixer(nn.Module):
    """Convolution of one half of the channels, max-pooling of the other; twice as many leave.

    Args:
        width: C, channels, even.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, width, kernel_size=1, bias=False)
        self.proj1 = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, bias=False)
        self.proj2 = nn.Conv2d(half, width, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2C, H, W)."""
        convolved, pooled = features.chunk(2, dim=1)
        convolved = F.gelu(self.proj1(self.conv1(convolved)))
        pooled = F.gelu(self.proj2(F.max_pool2d(pooled, kernel_size=3, stride=1, padding=1)))
        return torch.cat([convolved, pooled], dim=1)


class LowMixer(nn.Module):
    """Attention among all pixels, or among means of 2x2 of them.

    Nearest-neighbour interpolation gives all four pixels what their mean receives. An odd map is
    a choice of ours: its last row or column is repeated, so that the means there are of the
    pixels that exist, and what the repetition receives is cut off.

    Args:
        width: C, channels.
        num_heads: of the attention.
        is_pooled: attend among means.
    """

    def __init__(self, width: int, num_heads: int, *, is_pooled: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_pooled = is_pooled
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not self.is_pooled:
            return self._attend(features)
        height, width = features.shape[2:]
        if height % 2 or width % 2:
            features = F.pad(features, (0, width % 2, 0, height % 2), mode="replicate")
        mixed = F.interpolate(self._attend(F.avg_pool2d(features, 2)), scale_factor=2.0)
        return mixed[:, :, :height, :width]

    def _attend(self, features: Tensor) -> Tensor:
        size = features.shape[2:]
        parts = self.qkv(features.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(2, 3).flatten(1, 2).unflatten(2, size)


class _Stage(nn.Module):
    """(B, C', H', W') -> (B, C, H, W)."""

    def __init__(
        self, patch_embed: nn.Module, positions: Tensor, blocks: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(positions, std=STANDARD_DEVIATION))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, features: Tensor) -> Tensor:
        features = self.patch_embed(features)
        positions = self.pos_embed.permute(0, 3, 1, 2)
        if positions.shape[2:] != features.shape[2:]:
            positions = F.interpolate(positions, size=features.shape[2:], mode="bilinear")
        maps = (features + positions).permute(0, 2, 3, 1)
        return self.blocks(maps).permute(0, 3, 1, 2)


class _Scale(nn.Module):
    """Touvron et al., "Going deeper with Image Transformers", arXiv 2103.17239: layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), BRANCH_SCALE))

    def forward(self, branch: Tensor) -> Tensor:
        return self.scale * branch


def _stem(in_channels: int, width: int) -> nn.Sequential:
    """(B, C', H, W) -> (B, C, H / 4, W / 4), rounded up."""
    return nn.Sequential(
        *_halving(in_channels, width // 2), nn.GELU(), *_halving(width // 2, width)
    )


def _halving(in_channels: int, width: int) -> nn.Sequential:
    """(B, C', H, W) -> (B, C, H / 2, W / 2), rounded up."""
    conv = nn.Conv2d(in_channels, width, kernel_size=3, stride=2, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(width))


def _check(
    widths: Sequence[int], depths: Sequence[int], heads: Sequence[int], image_size: Sequence[int]
) -> None:
    if len(image_size) != len(PUBLISHED_SIZE):
        message = f"model=inception_transformer takes 2D images, got a size of {by(image_size)}"
        raise ShapeError(message)
    check_scales(widths, depths, divisor=HEAD_WIDTH)
    if len(heads) != sum(depths):
        problem = (
            f"model.attention_heads: {len(heads)} blocks do not go with the {sum(depths)} of "
            "model.depths"
        )
        raise ConfigError([problem])
    of_blocks = itertools.chain(*map(itertools.repeat, widths, depths))
    problems = [
        f"model.attention_heads: {count} is not from 1 to {width // HEAD_WIDTH - 1}, for a "
        f"width of {width}"
        for width, count in zip(of_blocks, heads, strict=True)
        if not 1 <= count < width // HEAD_WIDTH
    ]
    if problems:
        raise ConfigError(problems)
