"""The removal of channels from a net, as far as the net goes along with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from medlite.compression.channel_groups import ChannelGroup
from medlite.compression.channel_labels import FIXED
from medlite.compression.channel_trace import Place, label_channels, named_weights
from medlite.compression.copies import evaluation_copy
from medlite.compression.layer_sizes import run_without_data, sync_sizes
from medlite.errors import ExportError

Plan = tuple[ChannelGroup, list[int]]
"""A group, and the numbers of its units that are to go."""


def remove_units(
    net: nn.Module,
    images: Tensor,
    classes: Mapping[Place, Tensor],
    plans: Sequence[Plan],
    *,
    is_draft: bool = False,
) -> tuple[nn.Module, list[Plan]]:
    """A smaller copy of a net, and the plans that it follows.

    Some nets compute with numbers that they do not read from their weights, such as the size of
    a head. Plans after which the net fails, or couples its channels in another way than before,
    are found by halving and left out.

    Args:
        net: in evaluation mode; stays as it is.
        images: (B, C, H, W[, D]); only their shape is read.
        classes: those of `label_channels` for the net.
        plans: at most one for each group.
        is_draft: look no further than whether the net runs, which takes a fraction of the time.
    """
    _, shape = _shrink(net, images, [])

    def runs(plans: Sequence[Plan]) -> bool:
        return _shrink(net, images, plans)[1] == shape

    def keeps_classes(plans: Sequence[Plan]) -> bool:
        lost = _lost(plans)
        expected = {place: _drop(roots, 0, lost.get(place)) for place, roots in classes.items()}
        return _are_alike(expected, _classes(_shrink(net, images, plans)[0], images))

    for is_sound in (runs,) if is_draft else (runs, keeps_classes):
        plans = _largest_sound(plans, [], is_sound)
    return _shrink(net, images, plans)[0], list(plans)


def _largest_sound(
    plans: Sequence[Plan], others: list[Plan], is_sound: Callable[[Sequence[Plan]], bool]
) -> list[Plan]:
    """Those of some plans that can be followed after others."""
    if not plans or is_sound([*others, *plans]):
        return list(plans)
    if len(plans) == 1:
        return []
    half = len(plans) // 2
    first = _largest_sound(plans[:half], others, is_sound)
    return first + _largest_sound(plans[half:], others + first, is_sound)


def _lost(plans: Sequence[Plan]) -> dict[Place, Tensor]:
    """The indices that go, of each axis of each weight."""
    lost = defaultdict(list)
    for group, units in plans:
        for member in group.members:
            lost[member.name, member.axis].append(member.indices[units].flatten())
    return {place: torch.cat(indices) for place, indices in lost.items()}


def _shrink(
    net: nn.Module, images: Tensor, plans: Sequence[Plan]
) -> tuple[nn.Module, torch.Size | None]:
    """A copy of a net with shorter weights, and the shape of what it gives; None if it fails."""
    lost, smaller = _lost(plans), evaluation_copy(net)
    shortened: dict[Tensor, Tensor] = {}
    for name, tensor in named_weights(smaller):
        if tensor not in shortened:
            shortened[tensor] = _shorten(tensor, name, lost)
        owner, _, leaf = name.rpartition(".")
        setattr(smaller.get_submodule(owner), leaf, shortened[tensor])
    sync_sizes(smaller)
    return smaller, run_without_data(smaller, images)


def _shorten(tensor: Tensor, name: str, lost: Mapping[Place, Tensor]) -> Tensor:
    short = tensor.detach()
    for axis in range(tensor.ndim):
        short = _drop(short, axis, lost.get((name, axis)))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(short, tensor.requires_grad)
    return short


def _drop(tensor: Tensor, axis: int, indices: Tensor | None) -> Tensor:
    if indices is None:
        return tensor
    is_kept = torch.ones(tensor.shape[axis], dtype=torch.bool).index_fill(0, indices, value=False)
    return tensor.index_select(axis, is_kept.nonzero()[:, 0].to(tensor.device))


def _classes(net: nn.Module, images: Tensor) -> dict[Place, Tensor]:
    try:
        return label_channels(net, images)
    except ExportError:
        return {}


def _are_alike(first: Mapping[Place, Tensor], second: Mapping[Place, Tensor]) -> bool:
    """Whether two sets of classes put the same indices together, and fix the same ones."""
    first = {place: roots for place, roots in first.items() if len(roots) > 1}
    if {place: len(roots) for place, roots in first.items()} != {
        place: len(roots) for place, roots in second.items()
    }:
        return False
    fixed = torch.tensor([FIXED])
    pairs = torch.stack(
        [
            torch.cat([fixed, *first.values()]),
            torch.cat([fixed, *(second[place] for place in first)]),
        ]
    )
    num_classes = {len(roots.unique()) for roots in pairs}
    return {pairs.unique(dim=1).shape[1]} == num_classes
