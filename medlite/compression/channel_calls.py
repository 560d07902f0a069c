"""One call of an operator, seen by the rules that say what it does to the labels of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from medlite.compression.channel_labels import ChannelClasses, Labels


@dataclass(frozen=True)
class Call:
    """An operator and its arguments, with labels in the place of tensors."""

    classes: ChannelClasses
    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    """what it gave: a tensor, or several; only shapes are read"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result, where that is one tensor."""
        return tuple(self.result.shape)

    @property
    def operands(self) -> list[Labels]:
        """All labelled tensors that it read."""
        leaves = tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Labels)]

    def argument(self, place: int, name: str, default: Any) -> Any:
        """An argument that may be given by place, by name or not at all."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


def join(call: Call) -> Labels:
    """An elementwise operator: channels at the same place belong together."""
    terms = [range(-len(operand.shape), 0) for operand in call.operands]
    return call.classes.contract(terms, call.operands, range(-len(call.shape), 0), call.shape)


def keep_all(call: Call) -> Labels | list[Labels]:
    """An operator of which nothing is known: whatever channels it reads must stay."""
    for operand in call.operands:
        for labels in operand.along.values():
            call.classes.fix(labels)
    if isinstance(call.result, Tensor):
        return Labels(call.shape)
    return [Labels(tuple(part.shape)) for part in call.result]
