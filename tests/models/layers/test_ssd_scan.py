"""The head-shared scan against a float64 loop over time, its derivative by finite differences."""

# ruff: noqa: PLR0917 - the letters and the argument order of the paper

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.models.layers.scans import ssd
from medlite.models.layers.scans.reference import ssd_scan_reference
from medlite.models.layers.scans.ssd import ssd_scan


def make_operands(
    batch, sets, length, channels, heads, num_states=16, dtype=torch.float32, device="cpu"
):
    """Steps log-uniform in [1e-3, 1e-1] and rates in [-16, -1], as in a fresh Mamba-2 block."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator).to(device)

    def uniform(*shape):
        return torch.rand(*shape, dtype=dtype, generator=generator).to(device)

    delta = 1e-3 * 100 ** uniform(batch, sets, length, heads)
    B, C = normal(batch, sets, length, num_states), normal(batch, sets, length, num_states)
    x, D = normal(batch, sets, length, channels), normal(sets, channels)
    return [x, delta, -1 - 15 * uniform(sets, heads), B, C, D]


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


DELTAS = {
    "as initialised": lambda delta: delta,
    "up to 50": lambda delta: delta * 500,
    "zero with spikes of 20": lambda delta: torch.where(delta > 0.08, 20.0, 0.0),
    "a thousandth": lambda delta: delta * 1e-3,
    "all zero": torch.zeros_like,
}


@pytest.mark.parametrize("name", DELTAS)
def test_scan_equals_the_loop_over_4099_tokens(name):
    x, delta, *rest = make_operands(1, 1, 4099, 16, 2)
    operands = [x, DELTAS[name](delta), *rest]
    assert relative_error(ssd_scan(*operands), ssd_scan_reference(*operands)) < 1e-6


SHAPES = [(1, 1, 1, 1, 1, 1), (2, 3, 37, 6, 3, 4), (3, 4, 64, 12, 1, 16), (1, 1, 129, 8, 8, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_scan_equals_the_loop_for_any_shape(shape):
    operands = make_operands(*shape)
    assert relative_error(ssd_scan(*operands), ssd_scan_reference(*operands)) < 1e-6


def test_axis_of_parameter_sets_may_be_left_out():
    operands = make_operands(2, 1, 40, 6, 2)
    squeezed = [t.squeeze(axis) for t, axis in zip(operands, (1, 1, 0, 1, 1, 0), strict=True)]
    assert torch.equal(ssd_scan(*squeezed), ssd_scan(*operands).squeeze(1))


@pytest.mark.parametrize("shape", [(2, 2, 13, 4, 2, 2), (1, 1, 39, 2, 1, 1), (1, 2, 3, 2, 1, 2)])
def test_derivative_passes_gradcheck(monkeypatch, shape):
    monkeypatch.setattr(ssd, "CHUNK", 4)
    operands = make_operands(*shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(ssd_scan, [t.requires_grad_() for t in operands])


@pytest.mark.parametrize("name", DELTAS)
def test_derivative_stays_accurate_in_float32_over_long_sequences(name):
    x, delta, *rest = make_operands(1, 1, 700, 8, 2)
    operands = [t.requires_grad_() for t in (x, DELTAS[name](delta), *rest)]
    exact = [t.detach().double().requires_grad_() for t in operands]
    grads = torch.autograd.grad(ssd_scan(*operands).square().sum(), operands)
    expected = torch.autograd.grad(ssd_scan_reference(*exact).square().sum(), exact)
    for actual, true in zip(grads, expected, strict=True):
        smallest = torch.finfo(torch.float32).tiny
        assert (actual - true).abs().max() <= 1e-5 * true.abs().max() + smallest


@pytest.mark.parametrize("tile_elements", [1, 20_000])
def test_tiles_of_any_size_give_the_same_values_and_derivatives(monkeypatch, tile_elements):
    operands = [t.requires_grad_() for t in make_operands(5, 2, 40, 6, 3, dtype=torch.float64)]
    expected = ssd_scan(*operands)
    expected_grads = torch.autograd.grad(expected.square().sum(), operands)
    monkeypatch.setitem(ssd.TILE_ELEMENTS, "cpu", tile_elements)
    actual = ssd_scan(*operands)
    torch.testing.assert_close(actual, expected)
    actual_grads = torch.autograd.grad(actual.square().sum(), operands)
    torch.testing.assert_close(actual_grads, expected_grads)


def test_operands_are_left_alone():
    operands = make_operands(1, 1, 40, 4, 2)
    before = [t.clone() for t in operands]
    ssd_scan(*[t.requires_grad_() for t in operands]).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))


def test_no_output_depends_on_a_later_input():
    x, *rest = make_operands(1, 1, 80, 4, 2)
    x.requires_grad_()
    ssd_scan(x, *rest)[:, :, 40].sum().backward()
    assert x.grad[:, :, 41:].abs().max() == 0
    assert (x.grad[:, :, :41] != 0).all()


def test_mixed_precisions_compute_in_float32():
    x, delta, *rest = make_operands(1, 1, 40, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ssd_scan(x.bfloat16(), delta, *rest)
    assert actual.dtype == torch.float32
    assert relative_error(actual, ssd_scan_reference(x.bfloat16(), delta, *rest)) < 1e-6


def test_operator_registration_is_sound():
    operands = [t.requires_grad_() for t in make_operands(2, 2, 40, 4, 2, 3)]
    torch.library.opcheck(torch.ops.medlite.ssd_scan.default, operands)


class Scan(nn.Module):
    """Head-shared scans over tokens (B, P, L, D) whose step sizes are the tokens' own."""

    def __init__(self, sets=2, channels=8, heads=2):
        super().__init__()
        _, _, A, _, _, D = make_operands(1, sets, 1, channels, heads)
        self.A, self.D, self.heads = nn.Parameter(A), nn.Parameter(D), heads

    def forward(self, x):
        delta = x[..., : self.heads].exp() / 10
        return ssd_scan(x, delta, self.A, x[..., :4].sin(), x[..., 4:8].cos(), self.D)


@pytest.mark.parametrize("length", [1, 40, 1030])
def test_decomposition_is_plain_operators_for_any_batch(length):
    net, x = Scan(), torch.randn(2, 2, length, 8)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(net, (x,), dynamic_shapes=shapes)
    operator = torch.ops.medlite.ssd_scan.default
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert operator in calls
    table = torch._decomp.pre_autograd_decomposition_table
    plain = program.run_decompositions({operator: table[operator]})
    calls = {node.target for node in plain.graph.nodes if node.op == "call_function"}
    assert {getattr(call, "namespace", "python") for call in calls} <= {"aten", "python"}
    for batch in (1, 3):
        x = torch.randn(batch, 2, length, 8)
        torch.testing.assert_close(plain.module()(x), net(x), rtol=1e-5, atol=1e-5)


def test_flop_counter_counts_the_chunked_products():
    with FlopCounterMode(display=False) as counter:
        ssd_scan(*make_operands(2, 3, 64, 8, 2, 5))
    a_token = 2 * 32 * (5 + 8) + 4 * 5 * 8 + 2 * 8
    assert counter.get_total_flops() == 2 * 3 * 64 * a_token
