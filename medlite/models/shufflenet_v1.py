"""ShuffleNet V1: a classifier of grouped 1x1 convolutions whose groups are shuffled."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.channel_shuffle import channel_shuffle
from medlite.models.layers.sizes import require_spatial_dims

BOTTLENECK = 4
"""Channels of a unit's result, in units of those within."""


class ShuffleNetV1(nn.Module):
    """Zhang et al., "ShuffleNet: An Extremely Efficient CNN for Mobile Devices", arXiv 1707.01083.

    A convolution and a pooling to a quarter of the size, three stages of shuffle units, the mean
    of all pixels, a linear layer without bias. Of the settings in table 1 of the paper, for 3
    channels and 1000 classes:

    - 1.0x, 3 groups, the default: 1,864,728 parameters, 0.138 GMACs at 224x224;
    - 1.0x, 8 groups, widths 24-384-768-1536: 2,433,768, 0.138 GMACs;
    - 0.5x, 3 groups, widths 12-120-240-480: 717,324, 0.038 GMACs.

    Channels are shuffled in the order of the public code of the authors' company, by C / groups,
    which is the inverse of the paper's. Any size is taken, sides are halved rounding up.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits.
        widths: channels of the stem and of the stages.
        depths: units of each stage.
        groups: of the 1x1 convolutions, all but the first of the first stage.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (24, 240, 480, 960),
        depths: tuple[int, ...] = (4, 8, 4),
        groups: int = 3,
    ) -> None:
        super().__init__()
        _check(widths, depths, groups)
        stem_width = widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem_width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem_width),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.units = nn.Sequential()
        width = stem_width
        for next_width, depth in zip(widths[1:], depths, strict=True):
            first_groups = groups if self.units else 1
            self.units.append(ShuffleUnit(width, next_width, groups, first_groups=first_groups))
            self.units.extend(ShuffleUnit(next_width, next_width, groups) for _ in range(depth - 1))
            width = next_width
        self.head = nn.Linear(width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        require_spatial_dims(images, model="shufflenet_v1", spatial_dims=2)
        return self.head(self.units(self.stem(images)).mean((2, 3)))


class ShuffleUnit(nn.Module):
    """The shuffle unit (figure 2 of the paper).

    A grouped 1x1 convolution to a quarter of the channels, a shuffle, a depth-wise 3x3 and a
    grouped 1x1 convolution. With as many channels as before the input is added; with more the
    size is halved and the pooled input becomes the first of the channels.

    Args:
        in_channels: C.
        out_channels: C', not less than C.
        groups: of the 1x1 convolutions and the shuffle.
        first_groups: of the first of them, if it differs.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, *, first_groups: int | None = None
    ) -> None:
        super().__init__()
        self.is_halving = out_channels > in_channels
        hidden = out_channels // BOTTLENECK
        new_channels = out_channels - in_channels if self.is_halving else out_channels
        stride = 2 if self.is_halving else 1
        self.reduce = nn.Sequential(
            _conv1x1(in_channels, hidden, first_groups or groups), nn.BatchNorm2d(hidden), nn.ReLU()
        )
        self.shuffle_groups = hidden // groups
        self.mix = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            _conv1x1(hidden, new_channels, groups),
            nn.BatchNorm2d(new_channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W), or at half the size."""
        mixed = self.mix(channel_shuffle(self.reduce(features), self.shuffle_groups))
        if not self.is_halving:
            return F.relu(features + mixed)
        pooled = F.avg_pool2d(features, kernel_size=3, stride=2, padding=1)
        return torch.cat([pooled, F.relu(mixed)], dim=1)


def _check(widths: tuple[int, ...], depths: tuple[int, ...], groups: int) -> None:
    problems = []
    if len(depths) != len(widths) - 1:
        problems.append(
            f"model.depths: {len(depths)} stages do not go with the {len(widths) - 1} of "
            "model.widths, whose first is the stem's"
        )
    for width, next_width in itertools.pairwise(widths):
        if next_width <= width:
            problems.append(f"model.widths: {next_width} is not greater than {width} before it")
        if next_width % (BOTTLENECK * groups):
            problems.append(
                f"model.widths: {next_width} is not divisible by {BOTTLENECK * groups}, "
                f"{BOTTLENECK} times model.groups"
            )
    if (widths[1] - widths[0]) % groups:
        problems.append(
            f"model.widths: {widths[1]} - {widths[0]} is not divisible by {groups}, model.groups"
        )
    if problems:
        raise ConfigError(problems)


def _conv1x1(in_channels: int, out_channels: int, groups: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, groups=groups, bias=False)
