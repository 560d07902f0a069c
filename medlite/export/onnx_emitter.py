"""ONNX operators written one call at a time, for graphs that no translation of torch gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

Operand: TypeAlias = ir.Value | Sequence[int] | Sequence[Sequence[float]] | float
"""Whole numbers in a list are int64, all else float32."""

Size: TypeAlias = int | ir.Value
"""A length that is known, or one that the graph computes: (1,) int64."""


class Emitter:
    """Collects nodes; `emit("Mul", a, b)` returns the result as a value of the graph."""

    def __init__(self) -> None:
        self._tape = Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """All nodes so far, in order."""
        return tuple(self._tape.nodes)

    def __call__(self, operator: str, *operands: Operand, **attributes: Any) -> ir.Value:
        """Write one node with one output."""
        return self._tape.op(operator, self._values(operands), attributes)

    def several(
        self, operator: str, *operands: Operand, count: int, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Write one node with `count` outputs."""
        inputs = self._values(operands)
        return self._tape.op_multi_out(operator, inputs, attributes, num_outputs=count)

    def reshape(self, value: ir.Value, sizes: Sequence[Size]) -> ir.Value:
        """Reshape; -1 stands for the one size that follows from the others."""
        return self("Reshape", value, self._shape(sizes))

    def expand(self, value: Operand, sizes: Sequence[Size]) -> ir.Value:
        """Repeat along the axes that have one element."""
        return self("Expand", value, self._shape(sizes))

    def rearrange(
        self, value: ir.Value, source: str, target: str, sizes: Mapping[str, Size]
    ) -> ir.Value:
        """Permute axes that are named by letters, with as few moves as it takes.

        Axes of size 1 vanish and neighbours that stay neighbours become one axis, since both
        engines move a single axis many times faster than they permute in general.

        Args:
            value: any shape that holds the axes of `source` in their order.
            source: the letters, outermost first, such as "b g s f".
            target: the same letters in the order of the result.
            sizes: of every letter; -1 for at most one of them.

        Returns:
            The permuted value in a shape of the caller's to choose: groups of axes may be joined.
        """
        letters = [letter for letter in source.split() if sizes[letter] != 1]
        order = [letter for letter in target.split() if sizes[letter] != 1]
        groups: list[list[str]] = []
        for letter in letters:
            place = order.index(letter)
            follows = groups and place > 0 and order[place - 1] == groups[-1][-1]
            if follows:
                groups[-1].append(letter)
            else:
                groups.append([letter])
        permutation = sorted(range(len(groups)), key=lambda i: order.index(groups[i][0]))
        if permutation == list(range(len(groups))):
            return value
        joined = self.reshape(value, [self.product(*(sizes[n] for n in g)) for g in groups])
        return self("Transpose", joined, perm=permutation)

    def product(self, *sizes: Size) -> Size:
        """The product of lengths; -1 where one of them is -1."""
        known = [size for size in sizes if isinstance(size, int)]
        if -1 in known:
            return -1
        total: Size = math.prod(known)
        for size in sizes:
            if isinstance(size, ir.Value):
                factor = [total] if isinstance(total, int) else total
                total = self("Mul", size, factor)
        return total

    def constant(self, content: Any) -> ir.Value:
        """A constant; whole numbers in a list are int64, all else float32."""
        array = np.asarray(content)
        is_shape = isinstance(content, (list, tuple)) and array.dtype.kind == "i"
        tensor = ir.tensor(array.astype(np.int64 if is_shape else np.float32))
        return self._tape.op("Constant", [], {"value": tensor})

    def _shape(self, sizes: Sequence[Size]) -> Operand:
        if all(isinstance(size, int) for size in sizes):
            return [size for size in sizes if isinstance(size, int)]
        parts = [size if isinstance(size, ir.Value) else self.constant([size]) for size in sizes]
        return self("Concat", *parts, axis=0)

    def _values(self, operands: Sequence[Operand]) -> list[ir.Value]:
        return [o if isinstance(o, ir.Value) else self.constant(o) for o in operands]


def float_value(name: str, rank: int) -> ir.Value:
    """An input of a loop's body: float32, of so many axes of any length."""
    shape = ir.Shape([None] * rank)
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
