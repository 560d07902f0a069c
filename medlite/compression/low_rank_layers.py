"""Which layers of a net another module can take the place of, and how much they work."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from medlite.compression.copies import evaluation_copy
from medlite.compression.graph_search import meets
from medlite.compression.low_rank_factors import Factorable, Positions
from medlite.compression.quantizer import WEIGHTED, layer_name
from medlite.errors import MedliteError
from medlite.export.trace import deployable, trace

BATCH_SIZE = 2
"""batch normalisation cannot be trained on one value a channel"""


@dataclass(frozen=True)
class Survey:
    """The layers that may be factorised, and why the others may not; both by the first name."""

    positions: dict[str, Positions]
    left_alone: dict[str, str]


def survey_layers(
    net: nn.Module, input_shape: tuple[int, ...], *, keep_first: bool, keep_last: bool
) -> Survey:
    """Sort the convolutions and linear layers of a net.

    Args:
        net: left as it is.
        input_shape: (C, H, W[, D]) of one sample.
        keep_first: leave the layers that see the image itself.
        keep_last: leave the layers behind which there is no other weighted layer.

    Raises:
        MedliteError: the net's `forward` or `deploy` depends on the types of its layers.
    """
    left_alone = _unfit_layers(net)
    if keep_first or keep_last:
        ends = _ends(net, input_shape)
        wanted = {"first": keep_first, "last": keep_last}
        left_alone = {name: end for name, end in ends.items() if wanted[end]} | left_alone
    names = [name for name, layer in _layers(net) if name not in left_alone]
    usage = _watch(net, names, input_shape)
    for name in names:
        if usage.attributes[name]:
            read = ", ".join(sorted(usage.attributes[name]))
            left_alone[name] = f"read by other code ({read})"
        elif name not in usage.positions:
            left_alone[name] = "not called"
    free = {name: usage.positions[name] for name in names if name not in left_alone}
    return Survey(free, left_alone)


def replace_layer(net: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` wherever the layer of this name stands, under all its names."""
    old = net.get_submodule(name)
    for parent in list(net.modules()):
        for child_name, child in parent._modules.items():
            if child is old:
                parent._modules[child_name] = new


class _Usage:
    """What was seen of some layers: where they worked, and what else was asked of them."""

    def __init__(self) -> None:
        self.positions: dict[str, Positions] = {}
        self.attributes: dict[str, set[str]] = defaultdict(set)


class _StandIn(nn.Sequential):
    """A layer in a sequence, as its factors will be, that tells what is asked of it.

    What a sequence cannot answer the layer does. Copies tell the same listeners.
    """

    def __init__(
        self,
        layer: nn.Module,
        on_call: Callable[[Tensor, Tensor], None],
        on_read: Callable[[str], None],
    ) -> None:
        super().__init__(layer)
        self.on_call, self.on_read = on_call, on_read

    def forward(self, features: Tensor) -> Tensor:
        """As the layer."""
        result = super().forward(features)
        self.on_call(features, result)
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self._modules.get("0"), name)  # None until it is there
            self.on_read(name)
            return value


def _layers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kinds = nn.Linear | nn.modules.conv._ConvNd
    return ((name, part) for name, part in net.named_modules() if name and isinstance(part, kinds))


def _unfit_layers(net: nn.Module) -> dict[str, str]:
    """Why layers cannot be factorised, as far as they can be told by themselves."""
    parameters = (p for module in net.modules() for p in module._parameters.values())
    owners = Counter(id(parameter) for parameter in parameters)
    reasons = ((name, _why_unfit(layer, owners)) for name, layer in _layers(net))
    return {name: reason for name, reason in reasons if reason}


def _why_unfit(layer: Any, owners: Counter[int]) -> str:
    # Other classes, those of parametrisations too, compute something else.
    if type(layer) not in (nn.Linear, nn.Conv2d, nn.Conv3d):
        return f"a {type(layer).__name__}"
    if getattr(layer, "groups", 1) != 1:
        return "grouped"
    if any(owners[id(parameter)] > 1 for parameter in layer.parameters()):
        return "shares its weight"
    if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks:
        return "has hooks"
    return ""


def _ends(net: nn.Module, input_shape: tuple[int, ...]) -> dict[str, str]:
    """The layers without a weighted layer before or behind them, as quantisation finds them."""
    graph = trace(evaluation_copy(net), input_shape).module(check_guards=False).graph
    first_names = {id(module): name for name, module in net.named_modules()}
    layers = [node for node in graph.nodes if node.target in WEIGHTED]
    ends = {}
    for node in layers:
        name = first_names[id(net.get_submodule(layer_name(node)))]
        if not meets(node, layers, "behind"):
            ends[name] = "last"
        if not meets(node, layers, "before"):
            ends[name] = "first"
    return ends


@torch.no_grad()
def _watch(net: nn.Module, names: list[str], input_shape: tuple[int, ...]) -> _Usage:
    """Run a copy in evaluation, in its deployed form and in training."""
    usage, watched = _Usage(), evaluation_copy(net)
    for name in names:
        layer = watched.get_submodule(name)
        replace_layer(watched, name, _StandIn(layer, *_listeners(usage, name, layer)))
    images = torch.randn(BATCH_SIZE, *input_shape, generator=torch.Generator().manual_seed(0))
    plain = evaluation_copy(net)
    is_alike = torch.allclose(watched(images), plain(images), equal_nan=True)
    positions = dict(usage.positions)
    is_alike &= _deployed_alike(watched, plain, images)
    with torch.random.fork_rng(devices=[]):
        watched.train()(images)
    if not is_alike:
        message = (
            f"{type(net).__name__} cannot be factorised: it computes something else as soon as a "
            "layer stands inside an nn.Sequential, so its forward() or deploy() must depend on "
            "the types of its layers"
        )
        raise MedliteError(message)
    usage.positions = positions
    return usage


def _deployed_alike(watched: nn.Module, plain: nn.Module, images: Tensor) -> bool:
    if not callable(getattr(plain, "deploy", None)):
        return True
    logits = plain(images)
    difference = (deployable(watched)(images) - logits).abs().max()
    return bool(difference <= 1e-3 * logits.abs().max().clamp_min(1e-6))


def _listeners(
    usage: _Usage, name: str, layer: nn.Module
) -> tuple[Callable[[Tensor, Tensor], None], Callable[[str], None]]:
    num_outputs, num_inputs = cast("Factorable", layer).weight.shape[:2]

    def on_call(features: Tensor, result: Tensor) -> None:
        before = usage.positions.get(name, Positions(0, 0))
        usage.positions[name] = Positions(
            before.num_in + features.numel() // (num_inputs * BATCH_SIZE),
            before.num_out + result.numel() // (num_outputs * BATCH_SIZE),
        )

    def on_read(attribute: str) -> None:
        usage.attributes[name].add(attribute)

    return on_call, on_read
