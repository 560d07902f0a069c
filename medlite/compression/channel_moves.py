"""Rules for operators that move, cut, join or summarise tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from medlite.compression.channel_calls import Call, join
from medlite.compression.channel_labels import FIXED, ChannelClasses, Labels


def view(call: Call) -> Labels | list[Labels]:
    """An operator that gives views, run on labels that are spread over the tensor's shape."""
    source, *others = call.args
    spread = (_spread(labels, axis, source.shape) for axis, labels in source.along.items())
    views = [call.operator(sheet, *others, **call.kwargs) for sheet in spread]
    if isinstance(call.result, Tensor):
        return Labels(call.shape, dict(itertools.chain(*map(_gather, views))))
    return [
        Labels(
            tuple(part.shape), dict(itertools.chain(*(_gather(parts[place]) for parts in views)))
        )
        for place, part in enumerate(call.result)
    ]


def split(call: Call) -> Labels | list[Labels]:
    """Equal parts lose the same places; channels in unequal ones must stay."""
    axis = call.argument(2, "dim", 0) % len(call.args[0].shape)
    labels = call.args[0].along.get(axis)
    if labels is not None:
        if len({part.shape for part in call.result}) == 1:
            call.classes.unite_rows(labels.view(len(call.result), -1))
        else:
            call.classes.fix(labels)
    return view(call)


def cut(call: Call) -> Labels | list[Labels]:
    """What is picked by its number, or by its distance from an end, must stay."""
    source: Labels = call.args[0]
    axis = call.argument(1, "dim", 0) % len(source.shape)
    parts = [call.result] if isinstance(call.result, Tensor) else call.result
    if tuple(parts[0].shape) != source.shape:
        call.classes.fix(source.along.get(axis))
    return view(call)


def flip(call: Call) -> Labels:
    """Channels whose order changes must stay."""
    return _keep_along(call, call.args[1])


def roll(call: Call) -> Labels:
    """As `flip`."""
    return _keep_along(call, call.argument(2, "dims", ()) or range(len(call.shape)))


def pad(call: Call) -> Labels:
    """Channels that others are added to must stay."""
    grown = (axis for axis, size in enumerate(call.args[0].shape) if size != call.shape[axis])
    return _keep_along(call, grown)


def reshape(call: Call) -> Labels:
    """Outer parts stay as many as they are.

    Channels that are cut into parts lose the same places in every part; where two axes become
    one, only the channels of the inner axis can go.
    """
    source: Labels = call.args[0]
    along = {}
    for axes, new_axes in _blocks(source.shape, call.shape):
        free = [a for a in axes if a in source.along and not call.classes.is_fixed(source.along[a])]
        for outer in free[:-1]:
            call.classes.fix(source.along[outer])
        if free:
            sizes = source.shape[axes.start : axes.stop]
            sheet = _spread(source.along[free[-1]], free[-1] - axes.start, sizes)
            grid = sheet.reshape(call.shape[new_axes.start : new_axes.stop])
            axis, along_axis = _innermost(call.classes, grid)
            along[new_axes.start + axis] = along_axis
    return Labels(call.shape, along)


def concatenate(call: Call) -> Labels:
    """Tensors one after another on an axis of theirs, or on a new one."""
    parts, axis = call.args[0], call.argument(1, "dim", 0) % len(call.shape)
    if len(parts[0].shape) < len(call.shape):
        parts = [_unsqueezed(part, axis) for part in parts]
    along = {}
    for other in range(len(call.shape)):
        axes = [(part.shape[other], part.along.get(other)) for part in parts]
        if other != axis:
            along[other] = call.classes.meet(axes)
        elif any(labels is not None for _, labels in axes):
            along[axis] = torch.cat(
                [torch.full((size,), FIXED) if labels is None else labels for size, labels in axes]
            )
    return Labels(
        call.shape, {axis: labels for axis, labels in along.items() if labels is not None}
    )


def look_up(call: Call) -> Labels:
    """Rows of a table (R, C), picked by their numbers: the rows must stay, the columns need not."""
    table: Labels = call.args[0]
    call.classes.fix(table.along.get(0))
    columns = table.along.get(1)
    return Labels(call.shape, {} if columns is None else {len(call.shape) - 1: columns})


def reduce(call: Call) -> Labels | list[Labels]:
    """Sums, means and largest values over some axes: what is left depends on no single channel."""
    if len(call.operands) > 1:
        return join(call)
    source, given = call.args[0], call.argument(1, "dim", None)
    rank = len(source.shape)
    gone = {axis % rank for axis in ([given] if isinstance(given, int) else given or range(rank))}
    parts = [call.result] if isinstance(call.result, Tensor) else call.result
    keeps_axes = parts[0].ndim == rank
    along = {
        axis if keeps_axes else axis - sum(other < axis for other in gone): labels
        for axis, labels in source.along.items()
        if axis not in gone
    }
    results = [Labels(tuple(part.shape), along) for part in parts]
    return results[0] if isinstance(call.result, Tensor) else results


def resample(call: Call) -> Labels:
    """Pooling, interpolation and convolution of images (B, C, ...).

    Channels that are laid out as positions, as in ECA (arXiv:1910.03151), pass if the grid stays.
    """
    image: Labels = call.args[0]
    moved = [a for a in range(2, len(image.shape)) if image.shape[a] != call.shape[a]]
    return _keep_along(call, moved)


def _keep_along(call: Call, axes: Iterable[int]) -> Labels:
    """All labels stay where they are; what is along some axes must stay."""
    source: Labels = call.args[0]
    kept = {axis % len(source.shape) for axis in axes}
    for axis in kept:
        call.classes.fix(source.along.get(axis))
    along = {axis: labels for axis, labels in source.along.items() if axis not in kept}
    return Labels(call.shape, along)


def _spread(labels: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """Labels along an axis, with stride 0 along all others."""
    sizes = [1] * len(shape)
    sizes[axis] = len(labels)
    return labels.view(sizes).expand(tuple(shape))


def _gather(sheet: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The axis, if it is left, along which a view of what `_spread` gave is labelled."""
    for axis, size in enumerate(sheet.shape):
        if size > 1 and sheet.stride(axis):
            yield axis, sheet.movedim(axis, 0).flatten(1)[:, 0]


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The shortest runs of axes of two shapes that hold equally many elements."""
    place = new_place = 0
    while place < len(old) and new_place < len(new):
        first, new_first = place, new_place
        size, new_size = old[place], new[new_place]
        place, new_place = place + 1, new_place + 1
        while size != new_size:
            if size < new_size:
                size, place = size * old[place], place + 1
            else:
                new_size, new_place = new_size * new[new_place], new_place + 1
        yield range(first, place), range(new_first, new_place)


def _innermost(classes: ChannelClasses, grid: Tensor) -> tuple[int, Tensor]:
    """The last axis along which labels differ, which become the same wherever the others stand."""
    differing = [a for a in range(grid.ndim) if (grid != grid.narrow(a, 0, 1)).any()]
    axis = differing[-1] if differing else max(range(grid.ndim), key=lambda a: grid.shape[a])
    return axis, classes.unite_rows(grid.movedim(axis, -1).reshape(-1, grid.shape[axis]))


def _unsqueezed(labels: Labels, axis: int) -> Labels:
    shape = (*labels.shape[:axis], 1, *labels.shape[axis:])
    return Labels(shape, {old + (old >= axis): one for old, one in labels.along.items()})
