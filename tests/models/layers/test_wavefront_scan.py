"""The wavefront scan against a float64 loop over pixels, its derivative by finite differences."""

# ruff: noqa: PLR0917 - the argument order of the paper

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.models.layers.scans import wavefront
from medlite.models.layers.scans.reference import wavefront_scan_reference
from medlite.models.layers.scans.wavefront import wavefront_scan


def make_operands(batch, height, width, channels, num_states=16, dtype=torch.float32):
    """Steps log-uniform in [1e-3, 1e-1]; rates that differ between the two sources."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    size = (batch, 2, height, width)
    delta = 1e-3 * 100 ** torch.rand(*size, channels, dtype=dtype, generator=generator)
    rates = torch.arange(1, num_states + 1, dtype=dtype).repeat(2, channels, 1)
    A = -rates * torch.tensor([1, 1.5], dtype=dtype)[:, None, None]
    B, C = normal(*size, num_states), normal(batch, height, width, num_states)
    return [normal(batch, height, width, channels), delta, A, B, C, normal(channels)]


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
def test_scan_equals_the_loop_over_40_by_33_pixels(name):
    x, delta, *rest = make_operands(1, 40, 33, 4)
    operands = [x, DELTAS[name](delta), *rest]
    assert relative_error(wavefront_scan(*operands), wavefront_scan_reference(*operands)) < 1e-6


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 1, 5, 2, 3), (2, 5, 1, 2, 3), (2, 7, 4, 3, 2), (3, 6, 9, 5, 16)]
)
def test_scan_equals_the_loop_for_any_shape(shape):
    operands = make_operands(*shape)
    assert relative_error(wavefront_scan(*operands), wavefront_scan_reference(*operands)) < 1e-6


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 1, 3, 2, 2), (1, 3, 1, 2, 1), (2, 3, 4, 2, 2)]
)
def test_derivative_passes_gradcheck(shape):
    operands = make_operands(*shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(wavefront_scan, [t.requires_grad_() for t in operands])


def test_derivative_stays_accurate_in_float32():
    operands = [t.requires_grad_() for t in make_operands(1, 24, 17, 4)]
    exact = [t.detach().double().requires_grad_() for t in operands]
    grads = torch.autograd.grad(wavefront_scan(*operands).square().sum(), operands)
    expected = torch.autograd.grad(wavefront_scan_reference(*exact).square().sum(), exact)
    assert max(map(relative_error, grads, expected)) < 1e-5


@pytest.mark.parametrize("tile_elements", [1, 1000, 5000])
def test_tiles_of_any_size_give_the_same_values_and_derivatives(monkeypatch, tile_elements):
    operands = [t.requires_grad_() for t in make_operands(5, 6, 4, 3, 7, dtype=torch.float64)]
    expected = wavefront_scan(*operands)
    expected_grads = torch.autograd.grad(expected.square().sum(), operands)
    monkeypatch.setitem(wavefront.TILE_ELEMENTS, "cpu", tile_elements)
    actual = wavefront_scan(*operands)
    torch.testing.assert_close(actual, expected)
    actual_grads = torch.autograd.grad(actual.square().sum(), operands)
    torch.testing.assert_close(actual_grads, expected_grads)


def test_operands_are_left_alone():
    operands = make_operands(1, 5, 6, 4)
    before = [t.clone() for t in operands]
    wavefront_scan(*[t.requires_grad_() for t in operands]).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))


def test_output_depends_on_all_pixels_above_and_to_the_left_and_on_no_other():
    x, *rest = make_operands(1, 7, 9, 3)
    x.requires_grad_()
    wavefront_scan(x, *rest)[:, 3, 5].sum().backward()
    assert (x.grad[:, :4, :6] != 0).all()
    assert x.grad[:, 4:].abs().max() == 0
    assert x.grad[:, :, 6:].abs().max() == 0


def test_mixed_precisions_compute_in_float32():
    x, delta, *rest = make_operands(1, 6, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = wavefront_scan(x.bfloat16(), delta, *rest)
    assert actual.dtype == torch.float32
    expected = wavefront_scan_reference(x.bfloat16(), delta, *rest)
    assert relative_error(actual, expected) < 1e-6


def test_operator_registration_is_sound():
    operands = [t.requires_grad_() for t in make_operands(2, 5, 4, 3, 2)]
    torch.library.opcheck(torch.ops.medlite.wavefront_scan.default, operands)


class Scan(nn.Module):
    """A scan of maps (B, H, W, 4) whose other operands are functions of them."""

    def __init__(self, num_states=3):
        super().__init__()
        _, _, A, _, _, D = make_operands(1, 1, 1, 4, num_states)
        self.A, self.D = nn.Parameter(A), nn.Parameter(D)

    def forward(self, x):
        delta = torch.stack([x.exp() / 10, x.cos().square()], 1)
        B = torch.stack([x[..., :3].sin(), x[..., 1:]], 1)
        return wavefront_scan(x, delta, self.A, B, x[..., :3].cos(), self.D)


@pytest.mark.parametrize("size", [(1, 1), (3, 8), (6, 4)])
def test_decomposition_is_plain_operators_for_any_batch(size):
    net, x = Scan(), torch.randn(2, *size, 4)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    operator = torch.ops.medlite.wavefront_scan.default
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert operator in calls
    table = torch._decomp.pre_autograd_decomposition_table
    plain = program.run_decompositions({operator: table[operator]})
    calls = {node.target for node in plain.graph.nodes if node.op == "call_function"}
    assert {getattr(call, "namespace", "python") for call in calls} <= {"aten", "python"}
    for batch in (1, 3):
        x = torch.randn(batch, *size, 4)
        torch.testing.assert_close(plain.module()(x), net(x), rtol=1e-5, atol=1e-5)


def test_flop_counter_counts_a_scan_from_each_side():
    with FlopCounterMode(display=False) as counter:
        wavefront_scan(*make_operands(2, 5, 7, 3, 4))
    assert counter.get_total_flops() == 2 * 5 * 7 * 3 * (16 * 4 + 2)
