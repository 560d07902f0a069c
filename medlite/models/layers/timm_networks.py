"""Networks of timm: built by name, and merged for deployment."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import timm
from timm.utils.model import reparameterize_model
from torch import nn

from medlite.errors import ConfigError, MedliteError, ShapeError
from medlite.models.layers.dropout import drop_idle_dropout
from medlite.models.layers.sizes import by

Net = TypeVar("Net", bound=nn.Module)


def create_timm_network(
    name: str,
    *,
    key: str,
    in_channels: int,
    image_size: Sequence[int] | None,
    pretrained: bool,
    **arguments: Any,
) -> nn.Module:
    """Build timm's network `name` for images of `image_size` (H, W).

    Networks with a fixed grid are built for that grid; the others take any size.

    Args:
        name: as in `timm.list_models()`.
        key: configuration key that holds the name, for messages.
        in_channels: C, channels of the images.
        image_size: (H, W); None keeps the network's own size.
        pretrained: load timm's weights, downloading them where they are not cached.
        arguments: what else the network's constructor takes.

    Raises:
        ConfigError: no such network, argument or weights.
        MedliteError: the weights could not be downloaded.
    """
    if not timm.is_model(name):
        closest = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0))
        problem = f"{key}: timm has no network '{name}', did you mean one of: {closest}?"
        raise ConfigError([problem])
    if pretrained and not timm.models.is_model_pretrained(name):
        raise ConfigError([f"model.pretrained: timm has no weights for '{name}'; set it to false"])
    if image_size is not None and has_fixed_size(name):
        arguments["img_size"] = tuple(image_size)
    try:
        net = timm.create_model(name, pretrained=pretrained, in_chans=in_channels, **arguments)
    except TypeError as error:
        raise ConfigError([f"model: {error}"]) from error
    except OSError as error:
        raise no_weights(name) from error
    drop_idle_dropout(net)
    return net


def no_weights(name: str) -> MedliteError:
    """What is said where published weights cannot be had."""
    return MedliteError(
        f"the weights of '{name}' could not be downloaded; "
        "set model.pretrained=false (or take a teacher without timm/), or run once with a "
        "network connection to fill the cache"
    )


def grid_of(
    image_size: Sequence[int] | None, *, model: str, multiple: int = 1
) -> tuple[int, ...] | None:
    """The size (H, W) of the images that reach a network, rounded up to multiples.

    Raises:
        ShapeError: the images are volumes.

    >>> grid_of((50, 64), model="timm_unet", multiple=32)
    (64, 64)
    """
    if image_size is None:
        return None
    if len(image_size) != 2:
        message = f"model={model} takes 2D images, got {by(image_size)} volumes"
        raise ShapeError(message)
    return tuple(side + -side % multiple for side in image_size)


def has_fixed_size(name: str) -> bool:
    """Whether timm's network `name` only takes images of the size it was built for."""
    config = timm.get_pretrained_cfg(name)
    return config is not None and bool(config.fixed_input_size)


def merge_branches(net: Net) -> Net:
    """A copy of `net` in which parallel branches are merged (MobileOne, RepVGG, FastViT ...).

    The same function in evaluation mode, with fewer and larger layers.
    """
    merged = copy.deepcopy(net)
    blocks: list[Any] = list(merged.modules())
    for block in blocks:
        if hasattr(block, "reparameterize") and hasattr(block, "groups"):
            # timm merges by the group count of the construction, which pruning has outdated;
            # squeeze-and-excitation inside a depth-wise block has no groups
            groups = [m.groups for m in block.modules() if isinstance(m, nn.Conv2d)]
            block.groups = max(groups, default=block.groups)
    return cast("Net", reparameterize_model(merged, inplace=True))
