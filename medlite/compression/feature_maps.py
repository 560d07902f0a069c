"""Feature maps inside nets of any kind: what modules give, as (B, C, H, W[, D])."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import MedliteError, did_you_mean

_MOST_PREFIX_TOKENS = 5
"""in front of the places of a transformer's sequence: class, distillation, registers"""


@contextmanager
def tapped(
    net: nn.Module, paths: list[str], option: str, image_size: Sequence[int] | None = None
) -> Iterator[dict[str, Tensor]]:
    """The outputs of some modules, from every forward pass of `net` while the context lasts.

    Args:
        net: whose modules are listened to.
        paths: dotted names of modules.
        option: the option that named them, for the error.
        image_size: (H, W[, D]) of the images, to keep outputs as maps (see `as_map`); None
            keeps them as they are.

    Yields:
        The output of the last call of every module, by path.

    Raises:
        MedliteError: there is no such module.
    """
    outputs: dict[str, Tensor] = {}
    modules = dict(net.named_modules())
    for path in paths:
        if path not in modules:
            message = (
                f"{option}: {type(net).__name__} has no module '{path}', "
                f"{did_you_mean(path, modules)}"
            )
            raise MedliteError(message)
    handles = [
        modules[path].register_forward_hook(_keep_in(outputs, path, image_size)) for path in paths
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def deepest_features(net: nn.Module, images: Tensor) -> str:
    """The path of the module that gives the deepest feature map.

    That is the last one, in the order of execution, among those whose map has the fewest
    pixels, but more than one: what a U-Net enlarges first, what a classifier pools, the last
    tokens of a vision transformer. Sequences of tokens count where a map of their grid came
    before them, as from a patch embedding.

    Raises:
        MedliteError: no module gives a map.
    """
    sizes: list[tuple[int, str]] = []
    grids: set[tuple[int, ...]] = set()
    handles = [
        module.register_forward_hook(_append_size(sizes, grids, path, images))
        for path, module in net.named_modules()
        if path
    ]
    try:
        net(images)
    finally:
        for handle in handles:
            handle.remove()
    if not sizes:
        message = (
            f"features: no module of {type(net).__name__} gives a map of more than one pixel; "
            "name modules in distill.features, or set distill.feature_weight=0 and "
            "distill.rank_weight=0"
        )
        raise MedliteError(message)
    fewest = min(size for size, _ in sizes)
    return [path for size, path in sizes if size == fewest][-1]


def as_map(output: Any, image_size: Sequence[int]) -> Tensor | None:
    """What a module gave as (B, C, H, W[, D]), None where it cannot be seen so.

    Maps with channels in the last place, as of many state-space nets, are told from others by
    the proportions of the image, those of the closer fit. Tokens (B, L, C) are laid out on the
    grid of the same proportions; class and other tokens in front of them are left out.

    >>> as_map(torch.zeros(2, 17, 8), (64, 64)).shape
    torch.Size([2, 8, 4, 4])
    >>> as_map(torch.zeros(2, 4, 4, 8), (64, 64)).shape
    torch.Size([2, 8, 4, 4])
    """
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 3:
        grid = _grid_of_tokens(output.shape[1], image_size)
        if grid is None:
            return None
        places = output[:, -math.prod(grid) :].movedim(-1, 1)
        return places.reshape(*places.shape[:2], *grid)
    if output.ndim != len(image_size) + 2:
        return None
    views = (output, output.movedim(-1, 1))
    like = [view for view in views if _is_like(view.shape[2:], image_size)]
    return min(like, key=lambda view: max(_misfits(view.shape[2:], image_size)), default=None)


def smaller_grid(*maps: Tensor) -> tuple[int, ...]:
    """(H, W[, D]) with the shorter of each side."""
    return tuple(min(sides) for sides in zip(*(each.shape[2:] for each in maps), strict=True))


def pool_to(features: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A map (B, C, H, W[, D]) as the means of the cells of a coarser grid."""
    pool: Any = F.adaptive_avg_pool2d if len(grid) == 2 else F.adaptive_avg_pool3d
    return pool(features, grid)


def _is_like(grid: Sequence[int], image_size: Sequence[int]) -> bool:
    """Whether a grid has the proportions of the image, but for rounding and padding."""
    misfits = _misfits(grid, image_size)
    return all(misfit <= max(1 / side, 1 / 4) for side, misfit in zip(grid, misfits, strict=True))


def _misfits(grid: Sequence[int], image_size: Sequence[int]) -> list[float]:
    """How far each side is from the proportions of the image, as a share of it."""
    sides = list(zip(grid, image_size, strict=True))
    stride = max(size / side for side, size in sides)
    return [abs(side - size / stride) / side for side, size in sides]


def _grid_of_tokens(num_tokens: int, image_size: Sequence[int]) -> tuple[int, ...] | None:
    """The largest grid of whole patches that leaves only prefix tokens."""
    for patch in range(1, min(image_size) + 1):
        grid = tuple(size // patch for size in image_size)
        if 0 <= num_tokens - math.prod(grid) <= _MOST_PREFIX_TOKENS:
            return grid
    return None


def _keep_in(outputs: dict[str, Tensor], path: str, image_size: Sequence[int] | None) -> Any:
    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        seen = None if image_size is None else as_map(output, image_size)
        outputs[path] = output if seen is None else seen

    return keep


def _append_size(
    sizes: list[tuple[int, str]], grids: set[tuple[int, ...]], path: str, images: Tensor
) -> Any:
    def append(module: nn.Module, args: Any, output: Any) -> None:
        seen = as_map(output, images.shape[2:])
        if seen is None or len(seen) != len(images) or seen[0, 0].numel() <= 1:
            return
        grid = tuple(seen.shape[2:])
        if output.ndim == 3 and grid not in grids:
            return
        grids.add(grid)
        sizes.append((math.prod(grid), path))

    return append
