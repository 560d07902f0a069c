"""VMamba: a classifier of convolutions, 2-D scans with one state, and linear layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.drop_path import DropPath, rising_rates
from medlite.models.layers.initialization import draw_linear_layers
from medlite.models.layers.sizes import require_spatial_dims
from medlite.models.layers.ss2d import SS2D
from medlite.models.layers.ssm import Ssm

ONE_STATE = Ssm(d_state=1)


class VMamba(nn.Module):
    """Liu et al., "VMamba: Visual State Space Model", arXiv 2401.10166, in its faster form.

    The "s1l8" networks of the published code: SS2D layers with one state, without expansion and
    gate, each followed by an MLP. The defaults are VMamba-T, 30,249,064 parameters for 3
    channels and 1000 classes, 4.81 GMACs and 0.07 GFLOPs of scans at 224x224. Maps are
    (B, H, W, C) instead of that code's (B, C, H, W), with the same weights and the same result;
    1x1 convolutions are linear layers then. Any size is taken, sides are halved rounding up.

    Args:
        in_channels: channels of the images.
        num_classes: K, logits.
        width: C, channels of the first stage, even; each further stage doubles them.
        depths: blocks of each stage.
        mlp_ratio: hidden channels of the MLPs, in units of C.
        drop_path_rate: of the last block.
        ssm: the recurrence of the scans.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        width: int = 96,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        mlp_ratio: int = 4,
        drop_path_rate: float = 0.2,
        ssm: Ssm = ONE_STATE,
    ) -> None:
        super().__init__()
        if width % 2:
            raise ConfigError([f"model.width: {width} is not even, so the stem cannot halve it"])
        stem = (_Halving(in_channels, width // 2), nn.GELU(), _Halving(width // 2, width))
        self.patch_embed = nn.Sequential(*stem)
        widths = [width * 2**stage for stage in range(len(depths))]
        self.layers = nn.Sequential()
        for channels, rates in zip(widths, rising_rates(drop_path_rate, depths), strict=True):
            blocks = (VMambaBlock(channels, mlp_ratio, rate, ssm) for rate in rates)
            is_last = channels == widths[-1]
            downsample = nn.Identity() if is_last else _Halving(channels, 2 * channels)
            self.layers.append(nn.Sequential(*blocks, downsample))
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)
        draw_linear_layers(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        require_spatial_dims(images, model="vmamba", spatial_dims=2)
        maps = self.layers(self.patch_embed(images.permute(0, 2, 3, 1)))
        return self.head(self.norm(maps).mean((1, 2)))


class VMambaBlock(nn.Module):
    """An SS2D layer and an MLP, both normalised before and residual.

    Args:
        width: C, channels.
        mlp_ratio: hidden channels of the MLP, in units of C.
        drop_path_rate: of both branches.
        ssm: the recurrence.
    """

    def __init__(self, width: int, mlp_ratio: int, drop_path_rate: float, ssm: Ssm) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.op = SS2D(width, ssm, expand=1, is_gated=False, conv_bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width)
        )
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        maps = maps + self.drop_path(self.op(self.norm(maps)))
        return maps + self.drop_path(self.mlp(self.norm2(maps)))


class _Halving(nn.Module):
    """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C'), by a 3x3 convolution, normalised."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(self.conv(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
