"""The whole numbers in which torch's layers repeat the shapes of their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def sync_sizes(net: nn.Module) -> None:
    """Make the sizes that layers state those of their weights.

    A depth-wise convolution stays one, other grouped convolutions keep the number of groups.
    """
    for module in net.modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            vars(module).update(_sizes(module, module.get_parameter("weight").shape))


@torch.no_grad()
def run_and_adapt(net: nn.Module, images: Tensor) -> Tensor:
    """Run a net, and tell its normalisations without weights how many channels they see."""
    blank = [m for m in net.modules() if isinstance(m, _NormBase) and m.weight is None]
    handles = [module.register_forward_pre_hook(_adapt) for module in blank]
    try:
        return net(images)
    finally:
        for handle in handles:
            handle.remove()


def _adapt(module: nn.Module, args: Any) -> None:
    vars(module)["num_features"] = args[0].shape[1]


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
    is_depthwise = shape[1] == 1 and convolution.groups > 1
    multiplier = convolution.out_channels // convolution.groups
    return shape[0] // multiplier if is_depthwise else convolution.groups
