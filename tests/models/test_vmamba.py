"""VMamba against the published code's counts, and its block as the paper draws it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ConfigError, ShapeError
from medlite.models.vmamba import ONE_STATE, VMamba, VMambaBlock

SMALL = {"width": 16, "depths": (1, 1)}


def test_parameters_are_those_of_the_published_code():
    with torch.device("meta"):
        net = VMamba(in_channels=3, num_classes=1000)
    assert sum(parameter.numel() for parameter in net.parameters()) == 30_249_064


def test_multiply_adds_at_224_pixels_are_those_of_the_published_code():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        VMamba(in_channels=3, num_classes=1000).eval()(torch.empty(1, 3, 224, 224))
    scan_flops = counter.get_flop_counts()["Global"][torch.ops.medlite.selective_scan]
    assert scan_flops == pytest.approx(0.070e9, rel=0.01)
    assert (counter.get_total_flops() - scan_flops) / 2 == pytest.approx(4.813e9, rel=0.001)


def test_block_is_a_scan_layer_and_an_mlp_both_residual():
    torch.manual_seed(0)
    block, maps = VMambaBlock(16, 4, 0.0, ONE_STATE), torch.randn(2, 3, 5, 16)
    mixed = maps + block.op(block.norm(maps))
    first, _, last = block.mlp
    hidden = F.gelu(F.linear(block.norm2(mixed), first.weight, first.bias))
    expected = mixed + F.linear(hidden, last.weight, last.bias)
    assert hidden.shape[-1] == 64
    torch.testing.assert_close(block(maps), expected)


@pytest.mark.parametrize("size", [(28, 28), (33, 50), (64, 64)])
def test_any_size_is_taken(size):
    net = VMamba(in_channels=1, num_classes=5, width=8, depths=(1, 1, 1, 1)).eval()
    assert net(torch.zeros(2, 1, *size)).shape == (2, 5)


def test_volumes_are_refused():
    with pytest.raises(ShapeError, match=r"model=vmamba takes 2D images"):
        VMamba(in_channels=1, num_classes=2, **SMALL)(torch.zeros(1, 1, 16, 16, 16))


def test_width_that_the_stem_cannot_halve_is_refused():
    with pytest.raises(ConfigError, match=r"model\.width: 15 is not even"):
        VMamba(in_channels=1, num_classes=2, width=15)
