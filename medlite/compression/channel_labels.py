"""Labels of channels: which entries of tensors stand or fall together.

Every index of every axis of a net's weights begins as a class of its own. Following the net's
operators, classes that must keep or lose their indices together become one; the class `FIXED`
holds those that must stay.

A tensor's labels are sheets: integers of the tensor's shape, each the class of the channel that
the element belongs to. An activation (B, C, H, W) has one sheet that varies along C; a matrix has
two, for its rows and its columns. Sheets have stride 0 along the axes on which they do not
vary, so they cost no memory there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIXED = 0
"""the class of all that must stay"""


@dataclass(frozen=True)
class Labels:
    """A tensor's shape, and its sheets."""

    shape: tuple[int, ...]
    sheets: tuple[Tensor, ...] = ()

    def along(self, axis: int) -> Tensor | None:
        """The sheet that varies along an axis."""
        return next((sheet for sheet in self.sheets if axis in varying_axes(sheet)), None)


class ChannelClasses:
    """Disjoint sets of labels (union-find), and what tensor operations do to them."""

    def __init__(self) -> None:
        self._parents = [FIXED]

    def label(self, shape: Sequence[int]) -> Labels:
        """New labels for a weight, one for every index of every axis."""
        sheets = []
        for axis, size in enumerate(shape):
            first = len(self._parents)
            self._parents += range(first, first + size)
            indices = torch.arange(first, first + size)
            sheets.append(_spread(indices, axis, shape))
        return Labels(tuple(shape), tuple(sheets))

    def root(self, label: int) -> int:
        """The label that stands for a whole class."""
        path = []
        while self._parents[label] != label:
            path.append(label)
            label = self._parents[label]
        for passed in path:
            self._parents[passed] = label
        return label

    def unite(self, labels: Tensor, others: Tensor) -> None:
        """Make one class of each label and the other one at its place, after broadcasting."""
        pairs = torch.broadcast_tensors(_core(labels), _core(others))
        for first, second in torch.stack(pairs).flatten(1).unique(dim=1).T.tolist():
            low, high = sorted((self.root(first), self.root(second)))
            self._parents[high] = low

    def unite_along(self, sheet: Tensor, axes: Iterable[int]) -> Tensor:
        """Make one class of all labels that differ in their place on `axes` only."""
        first = sheet
        for axis in axes:
            first = first.narrow(axis, 0, 1)
        self.unite(sheet, first)
        return first.expand(sheet.shape)

    def fix(self, *sheets: Tensor) -> None:
        """Say that the channels of some sheets must stay."""
        for sheet in sheets:
            self.unite(sheet, torch.tensor(FIXED).view([1] * sheet.ndim))

    def tidy(self, shape: Sequence[int], sheets: Iterable[Tensor]) -> Labels:
        """Sheets in terms of classes: without repetitions, and without those that do not vary."""
        tidied: list[Tensor] = []
        for sheet in sheets:
            known = {axis for other in tidied for axis in varying_axes(other)}
            settled = self.settle(sheet)
            if varying_axes(settled) - known:
                tidied.append(settled.expand(tuple(shape)))
        return Labels(tuple(shape), tuple(tidied))

    def settle(self, sheet: Tensor) -> Tensor:
        """A sheet with the label of its class at every place, and stride 0 where it can."""
        core = _core(_collapse(sheet))
        unique, places = core.unique(return_inverse=True)
        roots = torch.tensor([self.root(label) for label in unique.tolist()])[places]
        return _collapse(roots).expand(sheet.shape)

    def join(self, operands: Sequence[Labels], shape: Sequence[int]) -> Labels:
        """The labels of what an elementwise operation makes of its operands.

        Channels at the same place become one class. A channel that meets an operand which has as
        many entries, but no channels there, must stay.
        """
        wide = [_broadcast(operand, shape) for operand in operands]
        for index, first in enumerate(wide):
            for second in wide[:index] + wide[index + 1 :]:
                self._meet(first, second)
        return self.tidy(shape, [sheet for operand in wide for sheet in operand.sheets])

    def einsum(self, equation: str, operands: Sequence[Labels], shape: Sequence[int]) -> Labels:
        """The labels of a product, summed over the letters that the result does not have.

        Args:
            equation: as `torch.einsum` takes it, without dots and repeated letters.
            operands: the factors.
            shape: of the result.
        """
        terms, result = equation.split("->")
        letters = result + "".join(sorted(set(terms) - set(result) - {","}))
        factors = [
            _arrange(operand, term, letters)
            for operand, term in zip(operands, terms.split(","), strict=True)
        ]
        sizes = torch.broadcast_shapes(*(factor.shape for factor in factors))
        product = self.join(factors, sizes)
        summed = [axis for axis in range(len(result), len(letters)) if sizes[axis] > 1]
        alone = [axis for axis in summed if terms.count(letters[axis]) == 1]
        self.fix(*(s for s in product.sheets if varying_axes(s) & set(alone)))
        return self.drop(product, range(len(result), len(letters)), shape)

    def drop(self, labels: Labels, axes: Iterable[int], shape: Sequence[int]) -> Labels:
        """Labels without some axes, over which is summed; `shape` is that of the result."""
        gone = set(axes)
        sheets = []
        for sheet in labels.sheets:
            if varying_axes(sheet) <= gone:
                continue
            united = self.unite_along(sheet, varying_axes(sheet) & gone)
            kept = united[tuple(0 if axis in gone else slice(None) for axis in range(sheet.ndim))]
            sheets.append(kept.reshape(tuple(shape)) if kept.ndim != len(shape) else kept)
        return self.tidy(shape, sheets)

    def _meet(self, first: Labels, second: Labels) -> None:
        """Unite the sheets of two operands that vary along a common axis; fix the lonely ones."""
        for sheet in first.sheets:
            axes = varying_axes(sheet)
            partners = [other for other in second.sheets if axes & varying_axes(other)]
            for partner in partners:
                self.unite(sheet, partner)
            if not partners and any(second.shape[axis] > 1 for axis in axes):
                self.fix(sheet)


def varying_axes(sheet: Tensor) -> set[int]:
    """The axes along which a sheet is not constant."""
    return {axis for axis, size in enumerate(sheet.shape) if size > 1 and sheet.stride(axis) != 0}


def _core(sheet: Tensor) -> Tensor:
    """A sheet, once instead of repeated."""
    varying = varying_axes(sheet)
    return sheet[tuple(slice(None) if a in varying else slice(0, 1) for a in range(sheet.ndim))]


def _collapse(sheet: Tensor) -> Tensor:
    """A sheet with stride 0 along all axes on which it is constant."""
    core = _core(sheet)
    for axis, size in enumerate(core.shape):
        first = core.narrow(axis, 0, 1)
        if size > 1 and bool((core == first).all()):
            core = first
    return core.expand(sheet.shape)


def _spread(indices: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    view = [1] * len(shape)
    view[axis] = len(indices)
    return indices.view(view).expand(tuple(shape))


def _broadcast(labels: Labels, shape: Sequence[int]) -> Labels:
    """An operand with leading axes of size 1 where it has fewer; sheets spread over `shape`."""
    own = (1,) * (len(shape) - len(labels.shape)) + labels.shape
    return Labels(own, tuple(sheet.expand(tuple(shape)) for sheet in labels.sheets))


def _arrange(labels: Labels, letters: str, order: str) -> Labels:
    """Permute axes, called by letters, into an order; those that are missing have size 1."""
    missing = [letter for letter in order if letter not in letters]
    axes = [("".join(missing) + letters).index(letter) for letter in order]

    def arrange(sheet: Tensor) -> Tensor:
        return sheet[(None,) * len(missing)].permute(axes)

    shape = (1,) * len(missing) + labels.shape
    return Labels(tuple(shape[axis] for axis in axes), tuple(map(arrange, labels.sheets)))
