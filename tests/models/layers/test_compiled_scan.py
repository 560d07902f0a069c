"""What the loops that numba compiles promise beyond the values of the scan."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from medlite.models.layers.scans import lanes, selective

pytest.importorskip("numba")

from medlite.models.layers.scans import compiled


def operands(batch=2, sets=2, length=100, channels=40, states=5):
    generator = torch.Generator().manual_seed(0)
    tokens = (batch, sets, length)
    return (
        torch.randn(*tokens, channels, generator=generator),
        0.1 * torch.rand(*tokens, channels, generator=generator),
        -torch.rand(sets, channels, states, generator=generator),
        torch.randn(*tokens, states, generator=generator),
        torch.randn(*tokens, states, generator=generator),
        torch.randn(sets, channels, generator=generator),
    )


def train(given):
    return compiled.forward(*given), *compiled.backward(torch.ones_like(given[0]), *given)


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(compiled, "LEAST_ELEMENTS", 1)


@pytest.mark.parametrize("batch", [1, 5])
def test_threads_that_share_rows_or_channels_change_nothing(monkeypatch, batch):
    given = operands(batch=batch, sets=1)
    alone = train(given)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(compiled, "LEAST_ELEMENTS", 1)
    assert len(compiled._parts(compiled._sizes(given[0], given[2]), 3)) >= 3
    for actual, expected in zip(train(given), alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("three_threads")
def test_calls_from_several_threads_do_not_disturb_each_other():
    given = operands()
    expected = train(given)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: train(given), range(16)):
            assert all(map(torch.equal, result, expected))


def test_thread_count_that_changes_during_a_call_does_no_harm(monkeypatch):
    """Buffers and parts must go by the same count: kernels do not check their indices."""
    given = operands(batch=1, sets=1)
    grad = torch.ones_like(given[0])
    expected = compiled.backward(grad, *given)
    counts = itertools.chain([1], itertools.repeat(3))
    monkeypatch.setattr(torch, "get_num_threads", lambda: next(counts))
    monkeypatch.setattr(compiled, "LEAST_ELEMENTS", 1)
    for actual, true in zip(compiled.backward(grad, *given), expected, strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-5, atol=1e-5)


def test_derivative_is_that_of_the_lanes():
    given = operands(length=67, channels=19)
    grad = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))
    expected = lanes.backward(grad.double(), *(t.double() for t in given))
    for actual, true in zip(compiled.backward(grad, *given), expected, strict=True):
        assert actual.shape == true.shape
        assert (actual - true).abs().max() < 1e-5 * true.abs().max()


def test_float32_on_the_cpu_takes_the_loops_and_all_else_the_lanes():
    x = torch.zeros(1, 1, 4, 2)
    assert selective.kernel_for(x) is compiled
    assert selective.kernel_for(x.double()) is lanes
    assert selective.kernel_for(x.to("meta")) is lanes


def test_without_numba_the_lanes_are_taken(monkeypatch):
    monkeypatch.setattr(selective, "find_spec", lambda name: None)
    selective._compiled_loops.cache_clear()
    assert selective.kernel_for(torch.zeros(1, 1, 4, 2)) is lanes
    monkeypatch.undo()
    selective._compiled_loops.cache_clear()


def test_numba_that_cannot_be_imported_is_told_of(monkeypatch):
    name = "medlite.models.layers.scans.compiled"
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr("medlite.models.layers.scans.compiled")
    selective._compiled_loops.cache_clear()
    with pytest.warns(UserWarning, match="numba cannot be used, so scans are slower"):
        assert selective.kernel_for(torch.zeros(1, 1, 4, 2)) is lanes
    selective._compiled_loops.cache_clear()
