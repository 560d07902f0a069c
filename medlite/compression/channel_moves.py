"""Rules for operators that move, cut, join or summarise tensors.

Those that only move elements are run on the labels themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medlite.compression.channel_calls import Call, keep_all
from medlite.compression.channel_labels import FIXED, ChannelClasses, Labels, varying_axes


def move(call: Call) -> Labels | list[Labels]:
    """Every element takes its label along."""
    moved = [call.on(sheet) for sheet in call.args[0].sheets]
    if isinstance(call.result, Tensor):
        return call.classes.tidy(call.shape, moved)
    return [
        call.classes.tidy(tuple(part.shape), [sheets[place] for sheets in moved])
        for place, part in enumerate(call.result)
    ]


def reshape(call: Call) -> Labels:
    """Outer parts stay as many as they are.

    Channels that are cut into parts lose the same places in every part; where two axes become
    one, only the channels of the inner axis can go.
    """
    classes, sheets, taken = call.classes, [], set[int]()
    for sheet in sorted(call.args[0].sheets, key=lambda s: max(varying_axes(s)), reverse=True):
        moved = classes.settle(sheet.reshape(call.shape))
        axes = sorted(varying_axes(moved))
        if len(axes) > len(varying_axes(sheet)):
            moved = classes.unite_along(moved, axes[:-1])
            axes = axes[-1:]
        if taken & set(axes):
            classes.fix(sheet)
        else:
            sheets.append(moved)
            taken |= set(axes)
    return classes.tidy(call.shape, sheets)


def split(call: Call) -> Labels | list[Labels]:
    """Equal parts lose the same places."""
    parts = move(call)
    if isinstance(parts, list) and len({part.shape for part in parts}) == 1:
        for other in parts[1:]:
            for sheet, same in zip(parts[0].sheets, other.sheets, strict=False):
                call.classes.unite(sheet, same)
    return parts


def cut(call: Call) -> Labels | list[Labels]:
    """What is picked by its number, or by its distance from an end, must stay."""
    source: Labels = call.args[0]
    axis = call.argument(1, "dim", 0) % len(source.shape)
    parts = [call.result] if isinstance(call.result, Tensor) else call.result
    is_whole = parts[0].ndim == len(source.shape) and parts[0].shape[axis] == source.shape[axis]
    if not is_whole:
        call.classes.fix(*(sheet for sheet in source.sheets if axis in varying_axes(sheet)))
    return move(call)


def index(call: Call) -> Labels | list[Labels]:
    """As `cut`, for tensors of numbers."""
    source, indices = call.args[:2]
    indexed = {axis for axis, numbers in enumerate(indices) if numbers is not None}
    is_free = not any(varying_axes(sheet) & indexed for sheet in source.sheets)
    return move(call) if is_free else keep_all(call)


def concatenate(call: Call) -> Labels:
    """Tensors one after another on an axis of theirs, or on a new one."""
    parts, axis = call.args[0], call.argument(1, "dim", 0) % len(call.shape)
    if len(parts[0].shape) < len(call.shape):
        parts = [_unsqueezed(part, axis) for part in parts]
    joined: dict[tuple[int, ...], Tensor] = {}
    for varying in range(len(call.shape)):
        sheets = [part.along(varying) for part in parts]
        if any(sheet is not None for sheet in sheets):
            joined.setdefault(tuple(map(id, sheets)), torch.cat([*_filled(parts, sheets)], axis))
    return call.classes.tidy(call.shape, joined.values())


def pad(call: Call) -> Labels:
    """Channels that are added stay; other axes only grow."""
    sheets = []
    for sheet in call.args[0].sheets:
        varying, sides, core = varying_axes(sheet), list(call.args[1]), sheet
        for axis in set(range(sheet.ndim)) - varying:
            core = core.narrow(axis, 0, 1)
        for place in range(len(sides) // 2):
            if sheet.ndim - 1 - place not in varying:
                sides[2 * place : 2 * place + 2] = [0, 0]
        sheets.append(F.pad(core, sides, value=FIXED).expand(call.shape))
    return call.classes.tidy(call.shape, sheets)


def reduce(call: Call) -> Labels | list[Labels]:
    """Sums, means and largest values over some axes: what is left depends on no single channel."""
    source, given = call.args[0], call.argument(1, "dim", None)
    axes = [given] if isinstance(given, int) else given or range(len(source.shape))
    gone = {axis % len(source.shape) for axis in axes}
    if isinstance(call.result, Tensor):
        return call.classes.drop(source, gone, call.shape)
    return [call.classes.drop(source, gone, tuple(part.shape)) for part in call.result]


def resample(call: Call) -> Labels:
    """Pooling and interpolation of images (B, C, ...)."""
    return call.classes.tidy(call.shape, resampled(call.classes, call.args[0], call.shape))


def resampled(classes: ChannelClasses, image: Labels, shape: Sequence[int]) -> list[Tensor]:
    """The sheets of an image (B, C, ...) on a grid of another size.

    Channels that are laid out as positions, as in ECA (arXiv:1910.03151), pass if the grid stays.
    """
    sheets = []
    for sheet in image.sheets:
        varying = varying_axes(sheet)
        spatial = {axis for axis in varying if axis > 1}
        if spatial != varying or not varying:
            kept = classes.unite_along(sheet, spatial)
            point = kept[(slice(None), slice(None), *[slice(0, 1)] * (sheet.ndim - 2))]
            sheets.append(point.expand(tuple(shape)))
        elif all(image.shape[axis] == shape[axis] for axis in spatial):
            grid = [-1 if axis in spatial else shape[axis] for axis in range(sheet.ndim)]
            narrow = tuple(slice(None) if a in spatial else slice(0, 1) for a in range(sheet.ndim))
            sheets.append(sheet[narrow].expand(grid))
        else:
            classes.fix(sheet)
    return sheets


def _filled(parts: Sequence[Labels], sheets: Sequence[Tensor | None]) -> Iterator[Tensor]:
    """The sheets, and where a part has none, one that says that all stays."""
    for part, sheet in zip(parts, sheets, strict=True):
        yield torch.tensor(FIXED).expand(part.shape) if sheet is None else sheet


def _unsqueezed(labels: Labels, axis: int) -> Labels:
    shape = (*labels.shape[:axis], 1, *labels.shape[axis:])
    return Labels(shape, tuple(sheet.unsqueeze(axis) for sheet in labels.sheets))
