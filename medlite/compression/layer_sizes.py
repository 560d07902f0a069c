"""The whole numbers in which torch's layers repeat the shapes of their weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from medlite.compression.copies import evaluation_copy


def sync_sizes(net: nn.Module) -> None:
    """Make the sizes that layers state those of their weights.

    A depth-wise convolution stays one, other grouped convolutions keep the number of groups.
    timm's blocks, which keep a copy of their convolution's groups, get the new one.
    """
    for module in net.modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            vars(module).update(_sizes(module, module.get_parameter("weight").shape))
    for module in net.modules():
        convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m is not module]
        if isinstance(getattr(module, "groups", None), int) and convolutions:
            vars(module)["groups"] = convolutions[0].groups


@torch.no_grad()
def run_without_data(net: nn.Module, images: Tensor) -> torch.Size | None:
    """The shape of what a net makes of images, or None if it fails; nothing is computed.

    Normalisations without weights get the number of channels that they see.
    """
    shadow = evaluation_copy(net).to("meta")
    for module, shade in zip(net.modules(), shadow.modules(), strict=True):
        if isinstance(module, _NormBase) and module.weight is None:
            shade.register_forward_pre_hook(functools.partial(_adapt, module))
    try:
        return shadow(images.to("meta")).shape
    except (RuntimeError, ValueError, IndexError, ArithmeticError, AssertionError):
        return None


def _adapt(module: nn.Module, shade: nn.Module, args: Any) -> None:
    for either in (module, shade):
        vars(either)["num_features"] = args[0].shape[1]


def _sizes(module: nn.Module, shape: torch.Size) -> dict[str, Any]:
    match module:
        case nn.Linear():
            sizes: dict[str, Any] = {"out_features": shape[0], "in_features": shape[1]}
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            groups = _groups(module, shape)
            sizes = {"out_channels": shape[0], "in_channels": shape[1] * groups, "groups": groups}
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            sizes = {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
        case _NormBase():
            sizes = {"num_features": shape[0]}
        case nn.GroupNorm():
            sizes = {"num_channels": shape[0]}
        case nn.LayerNorm():
            sizes = {"normalized_shape": tuple(shape)}
        case nn.PReLU():
            sizes = {"num_parameters": shape[0]}
        case _:
            sizes = {}
    return sizes


def _groups(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d, shape: torch.Size) -> int:
    is_depthwise = convolution.in_channels == convolution.groups
    multiplier = convolution.out_channels // convolution.groups
    return shape[0] // multiplier if is_depthwise and convolution.groups > 1 else convolution.groups
