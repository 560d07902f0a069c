"""What networks of libraries cost, as the field's tables have it."""

import pytest
import yaml

from medlite import config
from medlite.command_line import conf_directory
from medlite.export.layer_costs import count_layers, total

SIDE = 224
GMACS = {
    "mobilenetv1": 0.5687, "mobilenetv2": 0.3008, "mobilenetv3_large": 0.2166,
    "mobilenetv3_small": 0.0565, "shufflenet_v2_x1_0": 0.1449, "shufflenet_v2_x0_5": 0.0405,
    "mobileone_s0": 0.2751, "resnet18": 1.814, "resnet50": 4.089, "vgg16": 15.47,
    "mambaout_femto": 1.148, "mambaout_kobe": 1.506, "mambaout_tiny": 4.470,
    "efficientformerv2_s0": 0.3959, "levit_128s": 0.3047,
}  # fmt: skip
"""For 3 channels and 1000 classes, re-parameterised where the network can be."""

WITHOUT_ATTENTION = {"vit_tiny": 1.075, "deit_tiny_distilled": 1.080}
"""Tables count no products of attention where it is fused."""


def build(name):
    node = yaml.safe_load((conf_directory() / "model" / f"{name}.yaml").read_text())
    return config.build(node, in_channels=3, num_classes=1000)


def gmacs(name):
    return total(count_layers(build(name), (3, SIDE, SIDE))).macs / 1e9


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_are_those_of_the_tables(name):
    assert gmacs(name) == pytest.approx(GMACS[name], rel=0.01)


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_multiply_adds_of_transformers_are_those_of_the_tables_and_the_attention(name):
    num_tokens = (SIDE // 16) ** 2 + 1 + ("distilled" in name)
    attention = 12 * 2 * num_tokens**2 * 192 / 1e9
    assert gmacs(name) == pytest.approx(WITHOUT_ATTENTION[name] + attention, rel=0.01)


def test_multiply_adds_of_the_classic_unet_are_those_of_the_tables():
    node = yaml.safe_load((conf_directory() / "model" / "unet_classic.yaml").read_text())
    net = config.build(node, in_channels=1, num_classes=2, spatial_dims=2)
    sixteenth = total(count_layers(net, (1, 64, 64))).macs
    assert 16 * sixteenth / 1e9 == pytest.approx(51.12, rel=0.01)
