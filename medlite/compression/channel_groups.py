"""Which channels of a net can only be removed together, and their removal.

As in DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900),
dependencies come from the graph of the net. Here they are followed index by index, through the
operators of the exported graph (`medlite.compression.channel_rules`), so that permutations,
shared weights, merged patches and whatever else moves channels around need no rules of their own.
"""

from __future__ import annotations

import copy
import operator
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from medlite.compression.channel_calls import Call
from medlite.compression.channel_labels import FIXED, ChannelClasses, Labels
from medlite.compression.channel_rules import follow
from medlite.compression.layer_sizes import run_and_adapt, sync_sizes
from medlite.export.trace import trace


@dataclass(frozen=True)
class Member:
    """An axis of a weight that holds the channels of a group."""

    name: str
    axis: int
    indices: Tensor
    """(U, M): where each of the U units is found, M times"""


@dataclass(frozen=True)
class ChannelGroup:
    """Interchangeable units of channels; a unit goes from all its members at once."""

    members: tuple[Member, ...]

    @property
    def num_units(self) -> int:
        """U."""
        return len(self.members[0].indices)

    @property
    def unit_size(self) -> int:
        """Channels that a unit has in most of its members."""
        return statistics.mode(member.indices.shape[1] for member in self.members)


class ChannelGraph:
    """The channel groups of a net, and their removal.

    Args:
        net: pruned in place by `remove`.
        images: (B, C, H, W[, D]) to trace it with.
    """

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        self._net, self._images = net.train().eval(), images  # drops what layers cached
        self._expected_shape = self._output_shape()
        graph = trace(copy.deepcopy(net), tuple(images.shape[1:])).module(check_guards=False)
        self._tracer = _Tracer(graph, net)
        self._tracer.run(images)
        self._weights = dict([*net.named_parameters(), *net.named_buffers()])
        self._places = {
            name: [
                (table, leaf)
                for module in net.modules()
                for table in (module._parameters, module._buffers)
                for leaf, other in table.items()
                if other is tensor
            ]
            for name, tensor in self._weights.items()
        }
        self._lost: dict[tuple[str, int], Tensor] = {}

    def groups(self) -> list[ChannelGroup]:
        """All groups of channels that are free to go."""
        places: dict[int, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        for name, axis, index, root in self._tracer.labelled_indices():
            places[root][name, axis].append(index)
        places.pop(FIXED, None)
        alike: dict[Any, list[dict[tuple[str, int], list[int]]]] = defaultdict(list)
        for unit in places.values():
            alike[tuple((place, len(indices)) for place, indices in unit.items())].append(unit)
        return [
            ChannelGroup(
                tuple(
                    Member(name, axis, torch.tensor([unit[name, axis] for unit in units]))
                    for name, axis in units[0]
                )
            )
            for units in alike.values()
            if len(units[0]) > 1 and len(units) > 1
        ]

    def remove(self, group: ChannelGroup, units: list[int]) -> bool:
        """Remove the units of those numbers from every member of the group.

        Returns:
            Whether the net still runs, to the same shape of output; if not, it is as it was.
        """
        lost = dict(self._lost)
        undo = [self._shorten(m, m.indices[units].flatten()) for m in group.members]
        try:
            sync_sizes(self._net)
            if self._output_shape() == self._expected_shape:
                return True
        except (RuntimeError, ValueError, IndexError, AssertionError):
            pass  # the net computes with sizes that it does not read from its weights
        for name, tensor in reversed(undo):
            self._put(name, tensor)
        self._lost = lost
        sync_sizes(self._net)
        self._output_shape()
        return False

    def _shorten(self, member: Member, indices: Tensor) -> tuple[str, Tensor]:
        """Take indices (those of the unpruned net) from a weight; its name and what it was."""
        name, axis = member.name, member.axis
        old, gone = self._weights[name], self._lost.get((name, axis), torch.empty(0).long())
        self._lost[name, axis] = torch.cat([gone, indices])
        numbers = torch.arange(old.shape[axis] + len(gone))
        left = numbers[~torch.isin(numbers, gone)]
        kept = (~torch.isin(left, indices)).nonzero()[:, 0]
        short = old.detach().index_select(axis, kept.to(old.device))
        is_trained = isinstance(old, nn.Parameter)
        self._put(name, nn.Parameter(short, old.requires_grad) if is_trained else short)
        return name, old

    def _put(self, name: str, tensor: Tensor) -> None:
        """Replace a weight under all names that it has."""
        self._weights[name] = tensor
        for table, leaf in self._places[name]:
            table[leaf] = cast("Any", tensor)

    @torch.no_grad()
    def _output_shape(self) -> torch.Size:
        return run_and_adapt(self._net, self._images).shape


class _Tracer(fx.Interpreter):
    """Runs a graph, and beside it the labels of all its tensors."""

    def __init__(self, graph: fx.GraphModule, net: nn.Module) -> None:
        super().__init__(graph)
        self._classes = ChannelClasses()
        self._labels: dict[fx.Node, Any] = {}
        self._weights: dict[str, Labels] = {}
        known: dict[Tensor, Labels] = {}
        for name, tensor in _named_tensors(net):
            if tensor not in known:
                known[tensor] = self._classes.label(tensor.shape)
            self._weights[name] = known[tensor]

    def labelled_indices(self) -> Iterator[tuple[str, int, int, int]]:
        """(weight, axis, index, class) of all that can be told apart in the net's weights."""
        once = {id(labels): name for name, labels in reversed(self._weights.items())}
        for name in reversed(once.values()):
            labels = self._weights[name]
            for axis, size in enumerate(labels.shape):
                sheet = labels.sheets[axis].movedim(axis, 0).reshape(size, -1)[:, 0]
                for index, label in enumerate(sheet.tolist()):
                    yield name, axis, index, self._classes.root(label)

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        """The node's value; its labels are kept."""
        value = super().run_node(n)
        if n.op == "get_attr" and str(n.target) in self._weights:
            labels = self._weights[str(n.target)]
            self._labels[n] = self._classes.tidy(labels.shape, labels.sheets)
        elif n.op == "output":
            outputs = Call(
                self._classes, None, *fx.node.map_arg((n.args, {}), self._labelled), value
            )
            self._classes.fix(*(sheet for out in outputs.operands for sheet in out.sheets))
        elif n.target is operator.getitem:
            source, place = cast("tuple[fx.Node, int]", n.args)
            self._labels[n] = self._labels[source][place]
        elif n.op == "call_function" and not isinstance(value, int | float):
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), self._labelled)
            self._labels[n] = follow(Call(self._classes, n.target, args, kwargs, value))
        elif isinstance(value, Tensor):
            self._labels[n] = Labels(tuple(value.shape))
        return value

    def _labelled(self, node: fx.Node) -> Any:
        return self._labels[node] if node in self._labels else self.env[node]


def _named_tensors(net: nn.Module) -> list[tuple[str, Tensor]]:
    """All weights and buffers, with all their names."""
    parameters = net.named_parameters(remove_duplicate=False)
    return [*parameters, *net.named_buffers(remove_duplicate=False)]
