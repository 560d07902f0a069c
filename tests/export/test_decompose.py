"""Opaque operators become what their authors registered, and nothing else changes."""

import pytest
import torch
from torch import nn
from torch._decomp import register_decomposition

from medlite.errors import ExportError
from medlite.export.decompose import decompose
from medlite.export.trace import custom_operators, layer_of, trace

SHAPE = (3, 8, 8)


@torch.library.custom_op("medlite_test::tripled", mutates_args=())
def _tripled(images: torch.Tensor) -> torch.Tensor:
    return images * 3


@torch.library.custom_op("medlite_test::sealed", mutates_args=())
def _sealed(images: torch.Tensor) -> torch.Tensor:
    return images.clone()


_tripled.register_fake(torch.empty_like)
_sealed.register_fake(torch.empty_like)


@register_decomposition(torch.ops.medlite_test.tripled.default, type="pre_autograd")
def _as_sum(images):
    return images + images + images


class Tripled(nn.Module):
    def forward(self, images):
        return torch.ops.medlite_test.tripled(images)


class Sealed(nn.Module):
    def forward(self, images):
        return torch.ops.medlite_test.sealed(images)


class Net(nn.Module):
    """With ATen operators that torch would decompose if it were asked to."""

    def __init__(self, inner):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.odd = nn.Sequential(nn.GELU(), inner)
        self.norm = nn.LayerNorm(8)

    def forward(self, images):
        return self.norm(self.odd(self.stem(images)).mean((2, 3)))


def program_of(inner):
    torch.manual_seed(0)
    return trace(Net(inner).eval(), SHAPE)


def targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_named_operator_becomes_its_registered_decomposition():
    decomposed = decompose(program_of(Tripled()), {"medlite_test::tripled"})
    assert custom_operators(decomposed) == set()
    assert targets(decomposed).count("aten.add.Tensor") == 2


def test_decomposed_program_computes_the_same_at_any_batch_size():
    program = program_of(Tripled())
    decomposed = decompose(program, {"medlite_test::tripled"})
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, *SHAPE)
        expected, found = program.module()(images), decomposed.module()(images)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_operators_of_torch_stay_as_they_are():
    before = targets(program_of(Tripled()))
    after = targets(decompose(program_of(Tripled()), {"medlite_test::tripled"}))
    kept = [name for name in after if name != "aten.add.Tensor"]
    assert kept == [name for name in before if not name.startswith("medlite_test")]


def test_what_a_decomposition_brings_carries_the_name_of_its_layer():
    decomposed = decompose(program_of(Tripled()), {"medlite_test::tripled"})
    sums = [node for node in decomposed.graph.nodes if str(node.target) == "aten.add.Tensor"]
    assert [layer_of(node) for node in sums] == ["odd.1", "odd.1"]


def test_operators_that_are_not_named_are_left_alone():
    net = nn.Sequential(Tripled(), Sealed())
    decomposed = decompose(program_of(net), {"medlite_test::tripled", "medlite_test::absent"})
    assert custom_operators(decomposed) == {"medlite_test::sealed"}


def test_the_given_program_is_not_changed():
    program = program_of(Tripled())
    decompose(program, {"medlite_test::tripled"})
    assert custom_operators(program) == {"medlite_test::tripled"}


def test_program_without_the_operator_is_returned_as_it_is():
    program = program_of(nn.ReLU())
    assert decompose(program, {"medlite_test::sealed"}) is program


def test_operator_without_decomposition_is_named_with_its_layer():
    message = r"'medlite_test::sealed' in layer 'odd\.1' have no decomposition; register one with"
    with pytest.raises(ExportError, match=message):
        decompose(program_of(Sealed()), {"medlite_test::sealed"})
