"""Image sizes that a network can take, said before it fails somewhere deep inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medlite.errors import ConfigError, ShapeError

COMMON_STRIDE = 32
"""Of almost all networks that halve their maps five times."""


def require_divisible_sides(images: Tensor, *, model: str, divisor: int, spatial_dims: int) -> None:
    """Check that `images` (B, C, H, W[, D]) has sides that `model` can halve often enough.

    Raises:
        ShapeError: another number of axes, or a side that `divisor` does not divide.
    """
    require_spatial_dims(images, model=model, spatial_dims=spatial_dims)
    sides = images.shape[2:]
    if any(side % divisor for side in sides):
        mend = -(-max(sides) // divisor) * divisor
        message = f"model={model} needs sides divisible by {divisor}, got {by(sides)}"
        raise ShapeError(message, size=[mend] * spatial_dims, divisor=divisor)


def require_divisible_slices(volumes: Tensor, *, model: str, divisor: int) -> None:
    """Check that `volumes` (B, C, H, W, D) has slices that `model` can halve often enough.

    Raises:
        ShapeError: no volumes, or a height or width that `divisor` does not divide.
    """
    require_spatial_dims(volumes, model=model, spatial_dims=3)
    height, width, depth = volumes.shape[2:]
    if height % divisor or width % divisor:
        mend = [-(-height // divisor) * divisor, -(-width // divisor) * divisor, depth]
        message = (
            f"model={model} needs a height and width divisible by {divisor}, got "
            f"{by(volumes.shape[2:])}"
        )
        raise ShapeError(message, size=mend, divisor=divisor)


def require_size(images: Tensor, *, model: str, size: Sequence[int]) -> None:
    """Check that `images` (B, C, H, W) have the one size that `model` was built for.

    Raises:
        ShapeError: another size.
    """
    require_spatial_dims(images, model=model, spatial_dims=len(size))
    if tuple(images.shape[2:]) != tuple(size):
        expected, given = by(size), by(images.shape[2:])
        message = f"model={model} was built for {expected} images, got {given}"
        raise ShapeError(message)


@torch.no_grad()
def try_size(net: nn.Module, *, model: str, in_channels: int, size: Sequence[int]) -> None:
    """Run `net`, of a library that does not say which sizes it takes, on an image of `size`.

    Raises:
        ShapeError: it fails; proposes the next multiples of the usual stride.
    """
    was_training = net.training
    try:
        net.eval()(torch.zeros(1, in_channels, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        mend = [(side // COMMON_STRIDE + 1) * COMMON_STRIDE for side in size]
        message = f"model={model} cannot take {by(size)} images ({error})"
        mend = mend if len(size) > 2 else [max(mend)] * 2
        raise ShapeError(message, size=mend, divisor=COMMON_STRIDE) from error
    finally:
        net.train(was_training)


def check_scales(widths: Sequence[int], depths: Sequence[int], *, divisor: int) -> None:
    """Check that a model's widths and depths are of as many scales, and each width of groups.

    Raises:
        ConfigError: they are not, or a width that `divisor` does not divide.
    """
    problems = []
    if len(depths) != len(widths):
        problems.append(
            f"model.depths: {len(depths)} scales do not go with the {len(widths)} of model.widths"
        )
    problems += [
        f"model.widths: {width} is not divisible by {divisor}"
        for width in widths
        if width % divisor
    ]
    if problems:
        raise ConfigError(problems)


def by(size: Sequence[int]) -> str:
    """A size in words.

    >>> by((64, 32))
    '64x32'
    """
    return "x".join(str(side) for side in size)


def require_spatial_dims(images: Tensor, *, model: str, spatial_dims: int) -> None:
    """Check that `images` are pictures (`spatial_dims` 2) or volumes (3).

    Raises:
        ShapeError: another number of axes.
    """
    if images.ndim != spatial_dims + 2:
        axes = {2: "2D images (B, C, H, W)", 3: "3D volumes (B, C, H, W, D)"}[spatial_dims]
        message = (
            f"model={model} takes {axes}, got {tuple(images.shape)}; "
            "choose a model or a dataset that goes with the other"
        )
        raise ShapeError(message)
