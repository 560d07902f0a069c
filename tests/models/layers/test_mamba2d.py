"""The Mamba2D layer against its equations, with a loop over pixels in float64."""

import pytest
import torch
import torch.nn.functional as F

from medlite.models.layers import mamba2d
from medlite.models.layers.mamba2d import LocalPath, Mamba2D, StarReLU
from medlite.models.layers.scans.reference import wavefront_scan_reference


def make_lively_layer(d_model=20, d_state=4, **arguments):
    """A layer whose state weighs as much in the output as the direct path, unlike a fresh one."""
    torch.manual_seed(0)
    layer = Mamba2D(d_model, d_state, **arguments)
    with torch.no_grad():
        layer.x_proj.weight.mul_(10)
        for projection in layer.dt_proj:
            projection.bias.add_(3)
        layer.A_logs.add_(torch.tensor([0, 0.4])[:, None, None])
    return layer.double()


def make_maps(height=5, width=7, d_model=20):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, height, width, d_model, generator=generator, dtype=torch.float64)


def mix_sequentially(layer, maps, rank=2, d_state=4):
    weights = layer.state_dict()
    x = F.gelu(F.linear(maps, weights["in_proj.weight"], weights["in_proj.bias"]))
    projected = F.linear(x, weights["x_proj.weight"], weights["x_proj.bias"])
    sizes = [rank, rank, d_state, d_state, d_state]
    dt_left, dt_top, B_left, B_top, C = projected.split(sizes, dim=-1)
    delta = torch.stack(
        [F.softplus(layer.dt_proj[0](dt_left)), F.softplus(layer.dt_proj[1](dt_top))], 1
    )
    B = torch.stack([B_left, B_top], 1)
    y = wavefront_scan_reference(x, delta, -weights["A_logs"].exp(), B, C, weights["D"])
    mixed = F.linear(F.gelu(y), weights["out_proj.weight"], weights["out_proj.bias"])
    return mixed + layer.local_path(maps)


def test_layer_equals_the_loop_over_pixels():
    layer, maps = make_lively_layer(), make_maps()
    torch.testing.assert_close(layer(maps), mix_sequentially(layer, maps))


def test_layer_that_reads_backwards_equals_one_that_is_shown_everything_turned_by_180_degrees():
    backwards, forwards = make_lively_layer(reads_backwards=True), make_lively_layer()
    with torch.no_grad():
        forwards.local_path.conv.weight.copy_(backwards.local_path.conv.weight.flip(2, 3))
    maps = make_maps()
    torch.testing.assert_close(backwards(maps), forwards(maps.flip(1, 2)).flip(1, 2))


@pytest.mark.parametrize("axis", [1, 2])
def test_scan_is_what_tells_a_map_from_its_mirror_image(monkeypatch, axis):
    layer, maps = make_lively_layer(), make_maps()
    with torch.no_grad():
        layer.local_path.conv.weight[..., [0, 1, 2], [0, 1, 2]] = 0
        layer.local_path.conv.weight[:, :, 1, [0, 2]] = 0
        layer.local_path.conv.weight[:, :, [0, 2]] = 0

    def asymmetry():
        return (layer(maps.flip(axis)).flip(axis) - layer(maps)).abs().max()

    assert asymmetry() > 0.1
    monkeypatch.setattr(mamba2d, "wavefront_scan", lambda x, *_: x)
    assert asymmetry() < 1e-12


@pytest.mark.parametrize("reads_backwards", [False, True])
def test_pixel_is_seen_by_all_that_are_read_after_it_and_by_its_neighbours(reads_backwards):
    layer = make_lively_layer(reads_backwards=reads_backwards)
    maps = make_maps(8, 9)
    changed = maps.clone()
    changed[:, 3, 4] *= -1
    difference = (layer(changed) - layer(maps)).abs().amax((0, 3))
    sees = torch.zeros(8, 9, dtype=torch.bool)
    sees[2:5, 3:6] = True
    if reads_backwards:
        sees[:4, :5] = True
    else:
        sees[3:, 4:] = True
    assert torch.equal(difference > 1e-12, sees)
    assert difference[0 if reads_backwards else 7, 0 if reads_backwards else 8] > 1e-6


def test_parameters_are_those_of_no_expansion_and_16_states():
    shapes = {name: tuple(value.shape) for name, value in Mamba2D(20).state_dict().items()}
    assert shapes == {
        "A_logs": (2, 20, 16),
        "D": (20,),
        "in_proj.weight": (20, 20),
        "in_proj.bias": (20,),
        "x_proj.weight": (2 + 2 + 48, 20),
        "x_proj.bias": (52,),
        "dt_proj.0.weight": (20, 2),
        "dt_proj.0.bias": (20,),
        "dt_proj.1.weight": (20, 2),
        "dt_proj.1.bias": (20,),
        "out_proj.weight": (20, 20),
        "out_proj.bias": (20,),
        "local_path.norm.weight": (20,),
        "local_path.norm.bias": (20,),
        "local_path.widen.weight": (40, 20),
        "local_path.act1.scale": (1,),
        "local_path.act1.bias": (1,),
        "local_path.conv.weight": (40, 1, 3, 3),
        "local_path.act2.scale": (1,),
        "local_path.act2.bias": (1,),
        "local_path.narrow.weight": (20, 40),
    }


def test_fresh_steps_are_between_a_thousandth_and_a_tenth():
    for projection in Mamba2D(64).dt_proj:
        steps = F.softplus(projection.bias)
        assert 0.99e-3 < steps.min() < 3e-3
        assert 0.03 < steps.max() < 0.101


def test_layer_works_when_inner_channels_were_pruned():
    layer, maps, kept = make_lively_layer(), make_maps(), torch.arange(0, 20, 2)
    with torch.no_grad():
        layer.in_proj.weight = torch.nn.Parameter(layer.in_proj.weight[kept])
        layer.in_proj.bias = torch.nn.Parameter(layer.in_proj.bias[kept])
        layer.x_proj.weight = torch.nn.Parameter(layer.x_proj.weight[:, kept])
        for projection in layer.dt_proj:
            projection.weight = torch.nn.Parameter(projection.weight[kept])
            projection.bias = torch.nn.Parameter(projection.bias[kept])
        layer.A_logs = torch.nn.Parameter(layer.A_logs[:, kept])
        layer.D = torch.nn.Parameter(layer.D[kept])
        layer.out_proj.weight = torch.nn.Parameter(layer.out_proj.weight[:, kept])
    torch.testing.assert_close(layer(maps), mix_sequentially(layer, maps))


def test_local_path_stays_within_3x3_pixels():
    torch.manual_seed(0)
    path, maps = LocalPath(6), torch.randn(1, 7, 7, 6)
    changed = maps.clone()
    changed[:, 3, 3] = 0
    difference = (path(changed) - path(maps)).abs().amax((0, 3))
    assert (difference[2:5, 2:5] > 0).all()
    difference[2:5, 2:5] = 0
    assert difference.max() == 0


def test_star_relu_of_a_standard_normal_has_mean_0_and_variance_1():
    normal = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    activated = StarReLU()(normal)
    assert activated.mean().item() == pytest.approx(0, abs=0.005)
    assert activated.var().item() == pytest.approx(1, abs=0.02)
