"""The 2-D selective scan layer against a loop over directions and pixels, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F

from medlite.models.layers import ss2d
from medlite.models.layers.ss2d import SS2D
from medlite.models.layers.ssm import Ssm

FORMS = {
    "published first form": {},
    "published second form": {
        "ssm": Ssm(d_state=1),
        "expand": 1,
        "is_gated": False,
        "conv_bias": False,
    },
    "shared": {"is_shared": True},
    "heads": {"ssm": Ssm(kind="ssd", d_state=8, head_dim=8)},
    "shared heads": {"ssm": Ssm(kind="ssd", d_state=8, head_dim=8), "is_shared": True},
}
for_every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def make_lively_layer(d_model=24, **form):
    """A layer whose state weighs as much in the output as the direct path, unlike a fresh one."""
    torch.manual_seed(0)
    layer = SS2D(d_model, **form)
    with torch.no_grad():
        layer.x_proj_weight.mul_(10)
        layer.dt_projs_bias.add_(3)
    return layer


def pixels_in_order(height, width):
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]]


def scan_sequentially(x, pixels, weights):
    """(B, H, W, D) -> the same, one pixel after the other, by the weights of one direction."""
    dt_weight, inner = weights["dt_projs_weight"], x.shape[-1]
    rank, channels_a_step = dt_weight.shape[1], inner // len(dt_weight)
    d_state = (len(weights["x_proj_weight"]) - rank) // 2
    A = -weights["A_logs"].exp().view(len(dt_weight), -1).repeat_interleave(channels_a_step, 0)
    state, outputs = x.new_zeros(len(x), inner, d_state), torch.zeros_like(x)
    for i, j in pixels:
        u = x[:, i, j]
        dt, B, C = (u @ weights["x_proj_weight"].T).split([rank, d_state, d_state], dim=1)
        delta = F.softplus(dt @ dt_weight.T + weights["dt_projs_bias"])
        delta = delta.repeat_interleave(channels_a_step, dim=1)
        state = torch.exp(delta[:, :, None] * A) * state
        state = state + (delta * u)[:, :, None] * B[:, None]
        outputs[:, i, j] = (state * C[:, None]).sum(-1) + weights["Ds"] * u
    return outputs


def mix_sequentially(layer, maps):
    """The layer as the papers describe it, with a loop for each of the four directions."""
    w = {name: value.detach().double() for name, value in layer.state_dict().items()}
    inner, sets = w["out_proj.weight"].shape[1], len(w["x_proj_weight"])
    projected = maps.double() @ w["in_proj.weight"].T
    x = projected[..., :inner].permute(0, 3, 1, 2)
    x = F.conv2d(x, w["conv2d.weight"], w.get("conv2d.bias"), padding=1, groups=inner)
    x = F.silu(x).permute(0, 2, 3, 1)
    names = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
    total = torch.zeros_like(x)
    for k, pixels in enumerate(pixels_in_order(*x.shape[1:3])):
        own = {name: w[name].chunk(sets)[k % sets].squeeze(0) for name in names}
        total += scan_sequentially(x, pixels, own)
    mixed = F.layer_norm(total, [inner], w["out_norm.weight"], w["out_norm.bias"])
    if layer.is_gated:
        mixed = mixed * F.silu(projected[..., inner:])
    return mixed @ w["out_proj.weight"].T


@for_every_form
def test_layer_equals_the_loop_over_directions_and_pixels(form):
    layer, maps = make_lively_layer(**form), torch.randn(2, 5, 7, 24)
    expected = mix_sequentially(layer, maps)
    torch.testing.assert_close(layer.double()(maps.double()), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.float()(maps).double(), expected, rtol=1e-4, atol=1e-5)


@for_every_form
def test_replacing_the_scan_by_the_identity_is_noticed(form, monkeypatch):
    layer, maps = make_lively_layer(**form), torch.randn(2, 5, 7, 24)
    expected = mix_sequentially(layer, maps).float()
    monkeypatch.setattr(ss2d, "selective_scan", lambda x, *_: x)
    monkeypatch.setattr(ss2d, "ssd_scan", lambda x, *_: x)
    assert (layer(maps) - expected).abs().max() > 0.3 * expected.abs().max()


def test_parameters_have_the_published_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in SS2D(24).state_dict().items()}
    assert shapes == {
        "A_logs": (4 * 48, 16),
        "Ds": (4 * 48,),
        "in_proj.weight": (96, 24),
        "conv2d.weight": (48, 1, 3, 3),
        "conv2d.bias": (48,),
        "x_proj_weight": (4, 2 + 32, 48),
        "dt_projs_weight": (4, 48, 2),
        "dt_projs_bias": (4, 48),
        "out_norm.weight": (48,),
        "out_norm.bias": (48,),
        "out_proj.weight": (24, 48),
    }


def test_heads_share_steps_and_rates():
    state = SS2D(24, Ssm(kind="ssd", d_state=8, head_dim=16)).state_dict()
    assert state["A_logs"].shape == state["dt_projs_bias"].shape == (4, 3)
    assert state["dt_projs_weight"].shape == (4, 3, 2)


def test_initial_steps_are_log_uniform_between_a_thousandth_and_a_tenth():
    torch.manual_seed(0)
    delta = F.softplus(SS2D(1000, Ssm(d_state=1)).dt_projs_bias.flatten())
    quartiles = delta.log10().quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    expected = torch.tensor([-3.0, -2.5, -2, -1.5, -1])
    torch.testing.assert_close(quartiles, expected, atol=0.05, rtol=0)


def test_initial_rates_are_one_to_the_number_of_states():
    rates = SS2D(8, Ssm(d_state=3)).A_logs.exp()
    torch.testing.assert_close(rates, torch.tensor([1.0, 2, 3]).expand(64, 3))


def test_every_pixel_sees_all_others():
    layer, maps = make_lively_layer(8), torch.randn(1, 4, 5, 8, requires_grad=True)
    layer(maps)[0, 1, 2].sum().backward()
    assert (maps.grad.abs().amax(-1) > 0).all()


def test_layer_works_with_pruned_inner_channels():
    layer, maps = make_lively_layer(8), torch.randn(1, 4, 5, 8)
    kept, inner = 10, 16
    layer.out_norm = torch.nn.Identity()
    pruned = copy.deepcopy(layer)
    with torch.no_grad():
        layer.out_proj.weight[:, kept:] = 0
        layer.x_proj_weight[:, :, kept:] = 0
    keep_of_all = torch.cat([inner * k + torch.arange(kept) for k in range(4)])
    pruned.in_proj.weight.data = pruned.in_proj.weight.data[keep_of_all[: 2 * kept]]
    pruned.conv2d.groups = kept
    for parameter in (pruned.conv2d.weight, pruned.conv2d.bias):
        parameter.data = parameter.data[:kept]
    for parameter in (pruned.dt_projs_weight, pruned.dt_projs_bias):
        parameter.data = parameter.data[:, :kept]
    for parameter in (pruned.A_logs, pruned.Ds):
        parameter.data = parameter.data[keep_of_all]
    pruned.x_proj_weight.data = pruned.x_proj_weight.data[:, :, :kept]
    pruned.out_proj.weight.data = pruned.out_proj.weight.data[:, :kept]
    torch.testing.assert_close(pruned(maps), layer(maps))
