"""Classification networks that torchvision has and timm has not."""

from __future__ import annotations

from typing import Any, ClassVar

import torchvision
from timm.models import adapt_input_conv
from torch import Tensor, nn

from medlite.errors import ConfigError, did_you_mean
from medlite.models.layers.sizes import require_spatial_dims
from medlite.models.layers.timm_networks import no_weights

COLOURS = 3


class TorchvisionClassifier(nn.Module):
    """TorchVision, doi 10.1145/1873951.1874254: one of its classification networks by name.

    Its networks take three channels; for other images the weights of the first convolution are
    adapted as timm does it, so that a grey image gives what its three equal colours would.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits.
        name: as in `torchvision.models.list_models(torchvision.models)`.
        pretrained: start from torchvision's newest weights.
        arguments: what else the network's constructor takes, e.g. `dropout`.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        name: str,
        pretrained: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.name = name
        names = torchvision.models.list_models(torchvision.models)
        if name not in names:
            hint = did_you_mean(name, names)
            raise ConfigError([f"model.name: torchvision has no {name!r}, {hint}"])
        self.net = _create(name, num_classes, pretrained=pretrained, **arguments)
        if in_channels != COLOURS:
            _take_channels(self.net, in_channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        require_spatial_dims(images, model=self.name, spatial_dims=2)
        return self.net(images)


def _create(name: str, num_classes: int, *, pretrained: bool, **arguments: Any) -> nn.Module:
    """The network with its own head of K classes.

    Raises:
        ConfigError: an argument that its constructor does not take.
        MedliteError: the weights could not be downloaded.
    """
    try:
        net = torchvision.models.get_model(name, num_classes=num_classes, **arguments)
        if pretrained:
            net.load_state_dict(_weights_for(net, name), strict=False)
    except TypeError as error:
        raise ConfigError([f"model: {error}"]) from error
    except OSError as error:
        raise no_weights(name) from error
    return net


def _weights_for(net: nn.Module, name: str) -> dict[str, Tensor]:
    """The published weights less those whose shape another number of classes has changed."""
    published = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
    own = net.state_dict()
    return {key: value for key, value in published.items() if own[key].shape == value.shape}


def _take_channels(net: nn.Module, in_channels: int) -> None:
    """Adapt the first convolution to images of `in_channels`."""
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    first.weight = nn.Parameter(adapt_input_conv(in_channels, first.weight.data))
    first.in_channels = in_channels
