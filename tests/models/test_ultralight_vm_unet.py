"""UltraLight VM-UNet against the published counts and the layer written as four quarters."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ShapeError
from medlite.models.layers.ssm import Ssm
from medlite.models.ultralight_vm_unet import ParallelMamba, UltraLightVMUNet


def test_parameters_are_the_published_49457():
    net = UltraLightVMUNet(in_channels=3, num_classes=1)
    assert sum(parameter.numel() for parameter in net.parameters()) == 49_457


def test_multiply_adds_at_256_pixels_are_those_of_the_published_code():
    net = UltraLightVMUNet(in_channels=3, num_classes=1).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 256, 256))
    scan_flops = counter.get_flop_counts()["Global"][torch.ops.medlite.selective_scan]
    assert scan_flops == pytest.approx(0.0150e9, rel=0.01)
    assert (counter.get_total_flops() - scan_flops) / 2 == pytest.approx(0.0660e9, rel=0.001)


def test_heads_save_what_the_steps_and_rates_of_their_channels_cost():
    d_inner = torch.tensor([12, 16, 24, 32, 24, 16])
    heads = torch.tensor([3, 4, 6, 8, 6, 4])
    net = UltraLightVMUNet(in_channels=3, num_classes=1, ssm=Ssm(kind="ssd", head_dim=4))
    saved = (d_inner - heads) * 2 + 16 * d_inner - heads
    assert sum(p.numel() for p in net.parameters()) == 49_457 - saved.sum()


def test_parallel_mamba_equals_four_quarters_one_after_the_other():
    torch.manual_seed(0)
    layer, features = ParallelMamba(24, 32), torch.randn(2, 24, 4, 6)
    tokens = layer.norm(features.flatten(2).transpose(1, 2))
    quarters = [layer.mamba(q) + layer.skip_scale * q for q in tokens.chunk(4, dim=-1)]
    expected = layer.proj(layer.norm(torch.cat(quarters, dim=-1)))
    torch.testing.assert_close(layer(features), expected.transpose(1, 2).reshape(2, 32, 4, 6))


def test_wrong_size_is_refused_with_one_that_works():
    net = UltraLightVMUNet(in_channels=1, num_classes=1)
    message = (
        "model=ultralight_vm_unet needs sides divisible by 32, got 64x100; "
        "set dataset.image_size=128"
    )
    with pytest.raises(ShapeError, match=message):
        net(torch.zeros(1, 1, 64, 100))
    assert net(torch.zeros(1, 1, 128, 128)).shape == (1, 1, 128, 128)


def test_volumes_are_refused():
    net = UltraLightVMUNet(in_channels=1, num_classes=1)
    with pytest.raises(ShapeError, match=r"model=ultralight_vm_unet takes 2D images"):
        net(torch.zeros(1, 1, 32, 32, 32))
