"""MedMamba: a classifier whose blocks convolve one half of the channels and scan the other."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.drop_path import DropPath, rising_rates
from medlite.models.layers.initialization import draw_linear_layers
from medlite.models.layers.patches import PATCH_SIDE, PatchEmbed, PatchMerging
from medlite.models.layers.sizes import require_divisible_sides
from medlite.models.layers.ss2d import SS2D
from medlite.models.layers.ssm import S6, Ssm


class MedMamba(nn.Module):
    """Yue and Li, "MedMamba: Vision Mamba for Medical Image Classification", arXiv 2403.03849.

    Patches of 4x4, four stages of SS-Conv-SSM blocks with patch merging between them, the mean
    of all tokens. As the published code builds it, for 3 channels and 6 classes at 224x224:

    - T, depths 2-2-4-2: 14,457,222 parameters, 2.24 GMACs, 0.75 GFLOPs of scans;
    - S, depths 2-2-12-2: 22,793,094 parameters, 3.83 GMACs, 1.10 GFLOPs of scans;
    - B, depths 2-2-16-2, width 128: 47,126,022 parameters, 8.07 GMACs, 1.70 GFLOPs of scans.

    The depths are those that give the paper's sizes; the code's own examples of S and B have 4
    blocks less. Sides are divisible by 4. Where a map is odd, patch merging adds zeros (that
    code drops a row), so 28x28 can be halved thrice.

    MedMambaLite (arXiv 2508.05049) has no published code. Its paper trims MedMamba's redundancy
    and distils it into narrower students, 22.8 times smaller. The "-style" network here makes
    choices of its own: depth-wise separable convolutions (`separable_conv`), one set of scan
    parameters for all directions (`shared_scan`), width 32, depths 2-2-2-2. With them 653,958
    parameters, 0.10 GMACs and 0.22 GFLOPs of scans.

    Args:
        in_channels: channels of the images.
        num_classes: K, logits.
        width: C, channels of the first stage, even; each further stage doubles them.
        depths: blocks of each stage.
        drop_path_rate: of the last block.
        separable_conv: 3x3 convolutions as a depth-wise and a point-wise one.
        shared_scan: one set of scan parameters for all four directions.
        ssm: the recurrence of the scans.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        width: int = 96,
        depths: tuple[int, ...] = (2, 2, 4, 2),
        drop_path_rate: float = 0.1,
        separable_conv: bool = False,
        shared_scan: bool = False,
        ssm: Ssm = S6,
    ) -> None:
        super().__init__()
        if width % 2:
            problem = f"model.width: {width} is not even, so its blocks cannot halve it"
            raise ConfigError([problem])
        widths = [width * 2**stage for stage in range(len(depths))]
        self.patch_embed = PatchEmbed(in_channels, width)
        self.layers = nn.ModuleList(
            _Stage(
                [
                    SSConvSSM(
                        width,
                        rate,
                        ssm,
                        separable_conv=separable_conv,
                        shared_scan=shared_scan,
                    )
                    for rate in rates
                ],
                PatchMerging(width) if width < widths[-1] else nn.Identity(),
            )
            for width, rates in zip(widths, rising_rates(drop_path_rate, depths), strict=True)
        )
        self.head = nn.Linear(widths[-1], num_classes)
        draw_linear_layers(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        require_divisible_sides(images, model="medmamba", divisor=PATCH_SIDE, spatial_dims=2)
        maps = self.patch_embed(images)
        for layer in self.layers:
            maps = layer(maps)
        return self.head(maps.mean((1, 2)))


class SSConvSSM(nn.Module):
    """The SS-Conv-SSM block (figure 2 of the paper).

    The channels are split: three convolutions on the first half, an SS2D layer on the second;
    then the halves are interleaved and added to the input.

    Args:
        width: C, channels, even.
        drop_path_rate: of the scanned half.
        ssm: the recurrence.
        separable_conv: 3x3 convolutions as a depth-wise and a point-wise one.
        shared_scan: one set of scan parameters for all four directions.
    """

    def __init__(
        self,
        width: int,
        drop_path_rate: float,
        ssm: Ssm,
        *,
        separable_conv: bool = False,
        shared_scan: bool = False,
    ) -> None:
        super().__init__()
        half = width // 2
        self.ln_1 = nn.LayerNorm(half)
        self.self_attention = SS2D(half, ssm, is_shared=shared_scan)
        self.drop_path = DropPath(drop_path_rate)
        conv3x3 = _separable if separable_conv else _dense
        self.conv33conv33conv11 = nn.Sequential(
            nn.BatchNorm2d(half),
            conv3x3(half),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            conv3x3(half),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, kernel_size=1),
            nn.ReLU(),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        near, far = maps.chunk(2, dim=-1)
        near = self.conv33conv33conv11(near.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        far = self.drop_path(self.self_attention(self.ln_1(far)))
        return maps + torch.stack([near, far], dim=-1).flatten(3)


class _Stage(nn.Module):
    def __init__(self, blocks: list[SSConvSSM], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, maps: Tensor) -> Tensor:
        return self.downsample(self.blocks(maps))


def _dense(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, kernel_size=3, padding=1)


def _separable(channels: int) -> nn.Module:
    depthwise = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
    return nn.Sequential(depthwise, nn.Conv2d(channels, channels, kernel_size=1))
