"""The scan against a float64 loop over time, its derivative against finite differences."""

# ruff: noqa: N803, PLR0917 - the letters and the argument order of the paper

import copy
import importlib
import io
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.models.layers.scans import lanes, selective
from medlite.models.layers.scans.reference import selective_scan_reference
from medlite.models.layers.scans.selective import selective_scan


def make_operands(batch, length, channels, num_states=16, dtype=torch.float32, seed=0):
    """As in a freshly initialised Mamba block: steps log-uniform in [1e-3, 1e-1], A = -1..-N."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    exponent = torch.rand(batch, length, channels, dtype=dtype, generator=generator)
    delta = 1e-3 * 100**exponent
    A = -torch.arange(1, num_states + 1, dtype=dtype).repeat(channels, 1)
    B, C = normal(batch, length, num_states), normal(batch, length, num_states)
    return [normal(batch, length, channels), delta, A, B, C, normal(channels)]


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def spikes(delta):
    return torch.where(delta > 0.08, 20.0, 0.0)


DELTAS = {
    "as initialised": lambda delta: delta,
    "up to 50": lambda delta: delta * 500,
    "zero with spikes of 20": spikes,
    "a thousandth": lambda delta: delta * 1e-3,
    "all zero": torch.zeros_like,
}


@pytest.fixture(params=["lanes", "compiled"])
def kernel(request, monkeypatch):
    """Both kernels of the CPU, whichever would be picked."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    module = importlib.import_module(f"medlite.models.layers.scans.{request.param}")
    monkeypatch.setattr(selective, "kernel_for", lambda x: module)
    return module


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", DELTAS)
def test_scan_equals_the_loop_over_4096_tokens(name):
    x, delta, *rest = make_operands(1, 4096, 16)
    operands = [x, DELTAS[name](delta), *rest]
    expected = selective_scan_reference(*operands)
    assert relative_error(selective_scan(*operands), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", DELTAS)
def test_65536_tokens_lose_no_digits(name):
    x, delta, *rest = make_operands(1, 65536, 8)
    operands = [x, DELTAS[name](delta), *rest]
    assert relative_error(selective_scan(*operands), selective_scan_reference(*operands)) < 1e-6


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 37, 5, 3), (3, 64, 12, 16), (1, 129, 48, 4)])
def test_scan_equals_the_loop_for_any_shape(shape):
    operands = make_operands(*shape)
    assert relative_error(selective_scan(*operands), selective_scan_reference(*operands)) < 1e-6


@pytest.mark.parametrize("shape", [(2, 1, 2, 2), (2, 7, 3, 2), (1, 13, 2, 3), (3, 16, 2, 2)])
def test_derivative_passes_gradcheck(shape):
    operands = make_operands(*shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(selective_scan, [t.requires_grad_() for t in operands])


def with_parameter_sets(batch, sets, length, channels, num_states, dtype=torch.float32):
    """Operands that differ between the sets: (B, P, L, ...) and (P, ...)."""
    each = [make_operands(batch, length, channels, num_states, dtype, seed) for seed in range(sets)]
    x, delta, A, B, C, D = zip(*each, strict=True)
    A = [(1 + seed) * rates for seed, rates in enumerate(A)]
    axes = (1, 1, 0, 1, 1, 0)
    operands = (x, delta, A, B, C, D)
    return [torch.stack(list(o), dim=axis) for o, axis in zip(operands, axes, strict=True)]


@pytest.mark.usefixtures("kernel")
def test_parameter_sets_are_scans_of_their_own():
    x, delta, A, B, C, D = operands = with_parameter_sets(2, 4, 23, 5, 3)
    actual = selective_scan(*operands)
    for p in range(4):
        alone = selective_scan_reference(x[:, p], delta[:, p], A[p], B[:, p], C[:, p], D[p])
        assert relative_error(actual[:, p], alone) < 1e-6


def test_derivative_by_parameter_sets_passes_gradcheck():
    operands = with_parameter_sets(2, 3, 7, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(selective_scan, [t.requires_grad_() for t in operands])


@pytest.mark.parametrize("front_elements", [1, 200, 1500])
def test_tiles_of_any_size_give_the_same_values_and_derivatives(monkeypatch, front_elements):
    monkeypatch.setitem(lanes.FRONT_ELEMENTS, "cpu", front_elements)
    operands = [t.requires_grad_() for t in make_operands(5, 19, 4, 7, dtype=torch.float64)]
    expected = selective_scan_reference(*operands)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    actual = selective_scan(*operands)
    torch.testing.assert_close(actual, expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), operands)
    actual_grads = torch.autograd.grad((actual * weights).sum(), operands)
    torch.testing.assert_close(actual_grads, expected_grads)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", DELTAS)
def test_derivative_stays_accurate_in_float32_over_long_sequences(name):
    x, delta, *rest = make_operands(1, 1000, 8)
    operands = [t.requires_grad_() for t in (x, DELTAS[name](delta), *rest)]
    exact = [t.detach().double().requires_grad_() for t in operands]
    grads = torch.autograd.grad(selective_scan(*operands).square().sum(), operands)
    expected = torch.autograd.grad(selective_scan_reference(*exact).square().sum(), exact)
    for actual, true in zip(grads, expected, strict=True):
        assert (actual - true).abs().max() <= 1e-5 * true.abs().max()


def test_operands_are_left_alone():
    operands = make_operands(1, 16, 4)
    before = [t.clone() for t in operands]
    selective_scan(*[t.requires_grad_() for t in operands]).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("num_states", [1, 5])
def test_operands_may_be_strided(num_states):
    operands = make_operands(2, 20, 6, num_states)
    expected = selective_scan_reference(*operands)
    wide = [torch.stack([t, t + 1], dim=-1).flatten(-2) for t in operands]
    turned = [t.mT.contiguous().mT if t.ndim > 1 else t for t in operands]
    for strided in ([t[..., ::2] for t in wide], turned):
        assert relative_error(selective_scan(*strided), expected) < 1e-6


def test_no_output_depends_on_a_later_input():
    x, *rest = make_operands(1, 50, 3)
    x.requires_grad_()
    selective_scan(x, *rest)[:, 20].sum().backward()
    assert x.grad[:, 21:].abs().max() == 0
    assert (x.grad[:, :21] != 0).all()


def test_mixed_precisions_compute_in_float32():
    operands = make_operands(1, 40, 4)
    x, delta, *rest = operands
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = selective_scan(x.bfloat16(), delta, *rest)
    assert actual.dtype == torch.float32
    assert relative_error(actual, selective_scan_reference(x.bfloat16(), delta, *rest)) < 1e-6


class Scan(nn.Module):
    def __init__(self, channels=4, num_states=3):
        super().__init__()
        _, _, A, _, _, D = make_operands(1, 1, channels, num_states)
        self.A, self.D = nn.Parameter(A), nn.Parameter(D)

    def forward(self, x, delta, B, C):
        return selective_scan(x, delta, self.A, B, C, self.D)


def module_inputs(batch, length, channels=4, num_states=3):
    x, delta, _, B, C, _ = make_operands(batch, length, channels, num_states)
    return x, delta, B, C


def test_exported_program_holds_one_node_and_takes_any_batch_and_length():
    net = Scan()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 1: length},) * 4
    program = torch.export.export(net, module_inputs(2, 10), dynamic_shapes=shapes)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.medlite.selective_scan.default) == 1
    assert {str(call).split(".")[1] for call in calls} <= {"selective_scan", "unsqueeze", "squeeze"}
    inputs = module_inputs(3, 25)
    assert torch.equal(program.module()(*inputs), net(*inputs))


def test_operator_registration_is_sound():
    operands = [t.requires_grad_() for t in with_parameter_sets(2, 2, 9, 3, 2)]
    torch.library.opcheck(torch.ops.medlite.selective_scan.default, operands)


def test_modules_that_use_it_can_be_copied_and_pickled():
    net, inputs = Scan(), module_inputs(1, 10)
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(net), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(*inputs), net(*inputs))


def test_flop_counter_counts_the_scan():
    with FlopCounterMode(display=False) as counter:
        selective_scan(*make_operands(2, 10, 3, 5))
    assert counter.get_total_flops() == math.prod((2, 10, 3)) * (9 * 5 + 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", DELTAS)
def test_scan_and_derivative_on_cuda_are_those_of_the_cpu(name):
    x, delta, *rest = make_operands(2, 1000, 8)
    given = [x, DELTAS[name](delta), *rest]
    exact = [t.double().requires_grad_() for t in given]
    expected = selective_scan(*exact)
    operands = [t.cuda().requires_grad_() for t in given]
    actual = selective_scan(*operands)
    assert relative_error(actual.cpu(), expected) < 1e-6
    grads = torch.autograd.grad(actual.square().sum(), operands)
    for grad, true in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert (grad.cpu() - true).abs().max() <= 1e-5 * true.abs().max()
