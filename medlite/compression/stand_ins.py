"""What is put in the place of layers while a net's channels are traced.

Tracing follows one channel axis through elementwise operations, concatenations and layers. A
stand-in has the same shape of output as its layer, and hides what tracing would misread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medlite.compression.mamba_channels import is_mamba

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (*CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Opaque(nn.Module):
    """A layer as a block without inside: all its channels stay, on both sides.

    `in_channels` and `out_channels` are those of the last call.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that its parts are no parts of this one
        self.in_channels = self.out_channels = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives, tied to all tensors that it was given."""
        with torch.no_grad():
            outputs = self._layer[0](*args, **kwargs)
        first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        sources = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.in_channels, self.out_channels = _width(sources[0]), _width(first)
        tied = _Tie.apply(first, *sources)
        return (tied, *others) if isinstance(outputs, tuple) else tied


class _Tie(torch.autograd.Function):
    """Makes a tensor a function of others in autograd's graph, without saying which."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


class _Untied(nn.Module):
    """A layer whose result belongs to no graph."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)

    def forward(self, *args: Any) -> Any:
        with torch.no_grad():
            return self._layer[0](*args)


class _TiedWithInput(nn.Module):
    """A layer whose own parameters do not tie its result to the graph, only its input does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)

    def forward(self, features: Tensor) -> Tensor:
        with torch.set_grad_enabled(features.requires_grad):
            return self._layer[0](features)


class _Branch(nn.Module):
    """A layer whose result ends here for tracing, and goes on untied."""

    def __init__(self, layer: nn.Module, ends: list[Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self._ends = ends

    def forward(self, features: Tensor) -> Tensor:
        gate = self.layer(features)
        self._ends.append(gate)
        return gate.detach()


@contextmanager
def hide_activations(net: nn.Module) -> Iterator[None]:
    """Activations with one slope for all channels as ReLUs, and none in place."""
    in_place: list[Any] = [m for m in net.modules() if getattr(m, "inplace", False)]
    slopes = [m for m in net.modules() if isinstance(m, nn.PReLU) and m.num_parameters == 1]
    for module in in_place:
        module.inplace = False
    try:
        with _swapped(net, {module: nn.ReLU() for module in slopes}):
            yield
    finally:
        for module in in_place:
            module.inplace = True


@contextmanager
def hide_mixers(net: nn.Module) -> Iterator[None]:
    """Attention, and the layers that own a Mamba block, as blocks without inside.

    Attention is the innermost module with `num_heads`. The owner of a Mamba block is hidden with
    it, because it may cut its channels into parts or share a normalisation between them.
    """
    attention = [module for module in net.modules() if _holders_of_heads(module) == [module]]
    mambas = [_owner(net, name) for name, module in net.named_modules() if is_mamba(module)]
    with _swapped(net, {module: Opaque(module) for module in (*attention, *mambas)}):
        yield


@contextmanager
def hide_gates(
    net: nn.Module, *, keep: list[nn.Module]
) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """Convolutions with one output channel, which weight all channels of something else.

    One that makes its channel of many is followed up to there; one over (mean, largest) of all
    channels (CBAM, arXiv:1807.06521) is left out with what feeds it; one from one channel to one
    slides along channels laid out as positions (ECA, arXiv:1910.03151) and becomes the identity.

    Args:
        net: the net, back as it was afterwards.
        keep: the layers that give the net's outputs.

    Yields:
        A function from the net's output to all ends of the graph.
    """
    ends: list[Tensor] = []
    layers = [module for module in net.modules() if module not in keep]
    stand_ins = {module: _gate_stand_in(module, ends) for module in layers}
    with _swapped(net, {module: new for module, new in stand_ins.items() if new}):
        yield lambda output: [output, *ends]


def _gate_stand_in(module: nn.Module, ends: list[Tensor]) -> nn.Module | None:
    if getattr(module, "num_features", None) == 1:  # may be the gate's own normalisation
        return _TiedWithInput(module)
    if not isinstance(module, CONVOLUTIONS) or module.out_channels != 1:
        return None
    by_width = {1: nn.Identity(), 2: _Untied(module)}
    return by_width.get(module.in_channels) or _Branch(module, ends)


def output_layers(net: nn.Module, images: Tensor) -> list[nn.Module]:
    """The layers between which and the output there is no other layer."""
    makers: dict[Any, nn.Module] = {}

    def remember(layer: nn.Module, _: Any, output: Tensor) -> None:
        makers[output.grad_fn] = layer

    hooks = [m.register_forward_hook(remember) for m in net.modules() if isinstance(m, LAYERS)]
    try:
        to_visit, seen, found = [net.eval()(images).grad_fn], set(), []
    finally:
        for hook in hooks:
            hook.remove()
    while to_visit:
        step = to_visit.pop()
        if step in makers:
            found.append(makers[step])
        elif step is not None and step not in seen:
            seen.add(step)
            to_visit.extend(source for source, _ in step.next_functions)
    return found


@contextmanager
def _swapped(net: nn.Module, stand_ins: dict[nn.Module, nn.Module]) -> Iterator[None]:
    """Every occurrence of the modules replaced, as long as the context lasts."""
    places = [
        (owner, name, child)
        for owner in list(net.modules())
        for name, child in owner.named_children()
        if child in stand_ins
    ]
    for owner, name, child in places:
        setattr(owner, name, stand_ins[child])
    try:
        yield
    finally:
        for owner, name, child in places:
            setattr(owner, name, child)


def _owner(net: nn.Module, mamba_name: str) -> nn.Module:
    owner_name = mamba_name.rpartition(".")[0]
    owner = net.get_submodule(owner_name)
    is_layer = owner is not net and not isinstance(owner, CONTAINERS)
    return owner if is_layer else net.get_submodule(mamba_name)


def _holders_of_heads(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if hasattr(part, "num_heads")]


def _width(features: Tensor) -> int:
    """Channels of images (B, C, H, W[, D]), or of tokens (B, L, C) and vectors (B, C)."""
    return features.shape[1] if features.ndim > 3 else features.shape[-1]
