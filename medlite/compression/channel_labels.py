"""Labels of channels: which entries of tensors stand or fall together.

Every index of every axis of a net's weights begins as a class of its own. Following the net's
operators, classes that must keep or lose their indices together become one; the class `FIXED`
holds those that must stay.

An activation (B, C, H, W) is labelled along C, a matrix along its rows and its columns. Removing
a class leaves every tensor a full block, because an axis has the same labels wherever the
others stand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FIXED = 0
"""the class of all that must stay"""


@dataclass(frozen=True)
class Labels:
    """A tensor's shape, and the labels of its channels."""

    shape: tuple[int, ...]
    along: Mapping[int, Tensor] = field(default_factory=dict)
    """axis -> the class (size,) of each index; all of an axis that is not in it must stay"""


class ChannelClasses:
    """Disjoint sets of labels (union-find)."""

    def __init__(self) -> None:
        self._parents = [FIXED]

    def new(self, shape: Sequence[int]) -> Labels:
        """New labels for a weight, one for every index of every axis longer than 1."""
        along = {}
        for axis, size in enumerate(shape):
            if size > 1:
                first = len(self._parents)
                self._parents += range(first, first + size)
                along[axis] = torch.arange(first, first + size)
        return Labels(tuple(shape), along)

    def roots(self, labels: Tensor) -> Tensor:
        """The labels that stand for the whole classes."""
        return torch.tensor([self._root(label) for label in labels.tolist()])

    def unite(self, labels: Tensor, others: Tensor) -> None:
        """Make one class of each label and the other one at its place."""
        for label, other in zip(labels.tolist(), others.tolist(), strict=True):
            low, high = sorted((self._root(label), self._root(other)))
            self._parents[high] = low

    def unite_rows(self, rows: Tensor) -> Tensor:
        """Make one class of each column of (R, S), and return them."""
        for row in rows[1:]:
            self.unite(rows[0], row)
        return rows[0]

    def fix(self, labels: Tensor | None) -> None:
        """Say that channels must stay."""
        if labels is not None:
            self.unite(labels, torch.full_like(labels, FIXED))

    def is_fixed(self, labels: Tensor) -> bool:
        """Whether all of them must stay."""
        return bool((self.roots(labels) == FIXED).all())

    def meet(self, axes: Iterable[tuple[int, Tensor | None]]) -> Tensor | None:
        """Make one axis of some that an operator walks at the same time.

        Args:
            axes: size and labels of each; those of size 1 are broadcast and say nothing.
        """
        labels = [labels for size, labels in axes if size > 1]
        known = [one for one in labels if one is not None]
        for one in known:
            if len(known) < len(labels):
                self.fix(one)
            else:
                self.unite(known[0], one)
        return known[0] if known else None

    def contract(
        self,
        terms: Sequence[Sequence[Hashable]],
        operands: Sequence[Labels],
        result: Sequence[Hashable],
        shape: tuple[int, ...],
    ) -> Labels:
        """The labels of a product, summed over the axes that the result does not have.

        Args:
            terms: what the axes of each operand are called, as in `torch.einsum`.
            operands: the factors.
            result: what the axes of the product are called.
            shape: of the product.
        """
        axes = defaultdict(list)
        for term, operand in zip(terms, operands, strict=True):
            for axis, name in enumerate(term):
                axes[name].append((operand.shape[axis], operand.along.get(axis)))
        met = {name: self.meet(alike) for name, alike in axes.items()}
        along = {axis: met.get(name) for axis, name in enumerate(result)}
        return Labels(shape, {axis: labels for axis, labels in along.items() if labels is not None})

    def _root(self, label: int) -> int:
        path = []
        while self._parents[label] != label:
            path.append(label)
            label = self._parents[label]
        for passed in path:
            self._parents[passed] = label
        return label
