"""The MONAI adapter: argument names, dimensions, and what is said about mistakes."""

import pytest
import torch
from monai.networks import nets
from torch import nn

from medlite.errors import ConfigError, MissingDependency, ShapeError
from medlite.models.monai_network import MonaiNetwork


def network(name, **arguments):
    torch.manual_seed(0)
    return MonaiNetwork(in_channels=2, num_classes=3, name=name, **arguments).eval()


@pytest.mark.parametrize(
    ("name", "arguments", "has_map"),
    [
        ("BasicUNet", {"features": (8, 8, 8, 8, 8, 8)}, True),
        ("SegResNet", {"init_filters": 8}, True),
        ("AttentionUnet", {"channels": (8, 16), "strides": (2,)}, True),
        ("MedNeXtS", {}, True),
        ("resnet10", {"widen_factor": 0.25}, False),
        ("SEResNet50", {}, False),
        ("DenseNet", {"block_config": (2, 2), "init_features": 8}, False),
        ("EfficientNetBN", {"model_name": "efficientnet-b0", "pretrained": False}, False),
    ],
)
def test_arguments_reach_networks_whatever_they_call_them(name, arguments, has_map):
    net = network(name, **arguments)
    with torch.no_grad():
        logits = net(torch.zeros(2, 2, 32, 32))
    assert logits.shape == ((2, 3, 32, 32) if has_map else (2, 3))


def test_networks_take_volumes():
    net = network("BasicUNet", spatial_dims=3, norm="BATCH", features=(8, 8, 8, 8, 8, 8))
    with torch.no_grad():
        assert net(torch.zeros(1, 2, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


def test_idle_dropout_is_taken_out_and_active_dropout_stays():
    idle = network("BasicUNet", features=(8, 8, 8, 8, 8, 8))
    active = network("BasicUNet", features=(8, 8, 8, 8, 8, 8), dropout=0.2)
    assert not any(isinstance(module, nn.Dropout) for module in idle.modules())
    assert any(isinstance(module, nn.Dropout) for module in active.modules())


def test_misspelt_network_gets_the_closest_name():
    with pytest.raises(ConfigError, match=r"model\.name: MONAI has no 'BasicUnett', did you mean"):
        network("BasicUnett")


def test_argument_that_the_network_lacks_is_named():
    with pytest.raises(ConfigError, match=r"model: SegResNet of MONAI: .*'filters'"):
        network("SegResNet", filters=8)


def test_missing_argument_is_named():
    with pytest.raises(ConfigError, match=r"model: UNet of MONAI: .*'channels' and 'strides'"):
        network("UNet")


def test_images_of_other_dimensions_are_refused():
    net = network("BasicUNet", spatial_dims=3, features=(8, 8, 8, 8, 8, 8))
    with pytest.raises(
        ShapeError, match=r"model=BasicUNet takes 3D volumes .* got \(1, 2, 32, 32\)"
    ):
        net(torch.zeros(1, 2, 32, 32))


def test_network_of_several_outputs_is_refused():
    with pytest.raises(ConfigError, match=r"model\.name: SegResNetDS of MONAI returns a list"):
        network("SegResNetDS", init_filters=8, dsdepth=2).train()(torch.zeros(1, 2, 32, 32))


def test_missing_package_of_a_network_is_named(monkeypatch):
    def needs_another_package(in_channels, out_channels):
        message = "from einops import rearrange (No module named 'einops').\n\nFor details ..."
        raise ImportError(message)

    monkeypatch.setattr(nets, "UNETR", needs_another_package)
    expected = r"UNETR of MONAI needs a package that is not installed: .*'einops'\)\.$"
    with pytest.raises(MissingDependency, match=expected):
        network("UNETR")


def test_size_reaches_networks_that_are_built_for_one(monkeypatch):
    given = {}

    def for_one_size(in_channels, out_channels, img_size):
        given["img_size"] = img_size
        return nn.Identity()

    monkeypatch.setattr(nets, "UNETR", for_one_size)
    network("UNETR", image_size=(48, 32))
    assert given == {"img_size": (48, 32)}
