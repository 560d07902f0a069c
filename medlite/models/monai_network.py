"""Any network of MONAI, by the name of its class."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from monai.networks import nets
from torch import Tensor, nn

from medlite.errors import ConfigError, MissingDependency, did_you_mean
from medlite.models.layers.dropout import drop_idle_dropout
from medlite.models.layers.sizes import require_spatial_dims, try_size

INPUT_NAMES = ("in_channels", "n_input_channels")
OUTPUT_NAMES = ("out_channels", "num_classes")
SIZE_NAMES = ("img_size", "image_size")
USUAL_NAMES = {"in_channels", "out_channels", "spatial_dims"}
"""Of networks that only show `**kwargs`."""


class MonaiNetwork(nn.Module):
    """Cardoso et al., "MONAI", arXiv 2211.02701: one of its networks in 2D or 3D.

    Whether it segments or classifies is the network's matter; it returns one tensor of logits.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits.
        name: class or function of `monai.networks.nets`, e.g. "BasicUNet" or "resnet18".
        spatial_dims: 2 or 3.
        image_size: (H, W[, D]), for networks that are built for one size.
        arguments: what else the network's constructor takes.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation", "classification")

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        name: str,
        spatial_dims: Literal[2, 3] = 2,
        image_size: tuple[int, ...] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.name, self.spatial_dims = name, spatial_dims
        constructor = _find(name)
        names = _parameter_names(constructor)
        own: dict[str, Any] = {
            _first(INPUT_NAMES, names): in_channels,
            _first(OUTPUT_NAMES, names): num_classes,
        }
        if "spatial_dims" in names:
            own["spatial_dims"] = spatial_dims
        if image_size is not None and (size_name := _first(SIZE_NAMES, names)) in names:
            own[size_name] = image_size
        try:
            self.net = constructor(**(own | arguments))
        except ImportError as error:
            reason = str(error).partition("\n")[0]
            message = f"{name} of MONAI needs a package that is not installed: {reason}"
            raise MissingDependency(message) from error
        except (TypeError, ValueError) as error:
            raise ConfigError([f"model: {name} of MONAI: {error}"]) from error
        drop_idle_dropout(self.net)
        if image_size is not None and len(image_size) == spatial_dims:
            try_size(self, model=name, in_channels=in_channels, size=image_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W[, D]) -> logits (B, K) or (B, K, H, W[, D])."""
        require_spatial_dims(images, model=self.name, spatial_dims=self.spatial_dims)
        logits = self.net(images)
        if not isinstance(logits, Tensor):
            kind = type(logits).__name__
            problem = f"model.name: {self.name} of MONAI returns a {kind}, not one tensor of logits"
            raise ConfigError([problem])
        return logits


def _find(name: str) -> Callable[..., nn.Module]:
    constructor = getattr(nets, name, None)
    if name.startswith("_") or not callable(constructor):
        classes = [
            option
            for option, value in vars(nets).items()
            if inspect.isclass(value) and "in_channels" in _parameter_names(value)
        ]
        raise ConfigError([f"model.name: MONAI has no '{name}', {did_you_mean(name, classes)}"])
    return constructor


def _parameter_names(constructor: Callable[..., Any]) -> set[str]:
    """Arguments by name, also of what `**kwargs` are passed on to: base classes, or the result."""
    if inspect.isclass(constructor):
        sources: list[Any] = list(inspect.getmro(constructor)[:-1])
    else:
        result = typing.get_type_hints(constructor).get("return")
        sources = [constructor] if result is None else [constructor, result]
    parameters = [p for source in sources for p in inspect.signature(source).parameters.values()]
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} or (
        USUAL_NAMES
    )


def _first(options: tuple[str, ...], names: set[str]) -> str:
    """The option that the constructor names, or MONAI's usual one."""
    return next((option for option in options if option in names), options[0])
