"""One call of an operator, seen by the rules that say what it does to the labels of channels."""

from __future__ import annotations

from collections.abc import Sequence
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
    """what it really gave: a tensor, or several"""

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

    def on(self, sheet: Tensor) -> Any:
        """What the operator makes of a sheet instead of its first operand."""
        return self.operator(sheet, *self.args[1:], **self.kwargs)


def join(call: Call) -> Labels:
    """An elementwise operator: channels at the same place belong together."""
    return call.classes.join(call.operands, call.shape)


def keep_all(call: Call) -> Labels | list[Labels]:
    """An operator of which nothing is known: whatever channels it reads must stay."""
    call.classes.fix(*(sheet for operand in call.operands for sheet in operand.sheets))
    if isinstance(call.result, Tensor):
        return Labels(call.shape)
    return [Labels(tuple(part.shape)) for part in call.result]


def join_channel_weights(call: Call, image: Labels, weights: Sequence[Labels | None]) -> Labels:
    """Labels of an image (B, C, ...) that vectors (C,) are added to or multiplied with."""
    ones = (None,) * (len(image.shape) - 2)
    spread = [
        Labels((*w.shape, *[1] * len(ones)), tuple(sheet[(..., *ones)] for sheet in w.sheets))
        for w in weights
        if w is not None
    ]
    return call.classes.join([image, *spread], call.shape)
