"""The unrolled scan is the scan, for any length, and says so to torch's registry."""

import math

import pytest
import torch
from torch import nn

from medlite.export.decompose import decompose
from medlite.export.trace import custom_operators, trace
from medlite.models.layers.mamba import MambaBlock
from medlite.models.layers.scans.reference import selective_scan_reference
from medlite.models.layers.scans.unrolled import unrolled_scan

OPERATOR = "medlite::selective_scan"


def operands(length, *, batch=2, sets=1, channels=3, states=4, scale=1.0):
    """Step sizes and decays as Mamba has them at initialisation, times `scale`."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    delta = torch.rand(batch, sets, length, channels, generator=generator) * math.log(100)
    A = -torch.rand(sets, channels, states, generator=generator) * states
    return (
        normal(batch, sets, length, channels),
        1e-3 * delta.exp() * scale,
        A,
        normal(batch, sets, length, states),
        normal(batch, sets, length, states),
        normal(sets, channels),
    )


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 49, 64, 127, 512, 1021, 2048])
def test_outputs_are_those_of_the_definition_at_any_length(length):
    given = operands(length)
    assert relative_error(unrolled_scan(*given), selective_scan_reference(*given)) < 1e-6


@pytest.mark.parametrize("sets", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_sets_of_parameters_keep_their_own_rates(batch, sets):
    given = operands(100, batch=batch, sets=sets)
    assert relative_error(unrolled_scan(*given), selective_scan_reference(*given)) < 1e-6


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e3], ids=["no decay", "long memory", "no memory"])
def test_outputs_are_exact_for_extreme_steps(scale):
    given = operands(600, scale=scale)
    assert relative_error(unrolled_scan(*given), selective_scan_reference(*given)) < 1e-6


def test_spikes_among_steps_of_zero_do_no_harm():
    x, delta, *others = operands(600)
    delta.zero_()
    delta[:, :, ::97] = 20.0
    given = (x, delta, *others)
    assert relative_error(unrolled_scan(*given), selective_scan_reference(*given)) < 1e-6


def program_of_a_block(side):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = MambaBlock(8, d_state=4)
            with torch.no_grad():
                self.block.x_proj.weight.mul_(10)
                self.block.dt_proj.bias.add_(3)

        def forward(self, images):
            tokens = self.block(images.flatten(2).transpose(1, 2))
            return tokens.transpose(1, 2).reshape(images.shape)

    torch.manual_seed(0)
    return trace(Net().eval(), (8, side, side))


def test_program_with_a_scan_decomposes_for_any_batch_size():
    program = program_of_a_block(side=9)
    decomposed = decompose(program, {OPERATOR})
    assert custom_operators(decomposed) == set()
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, 8, 9, 9)
        expected, found = program.module()(images), decomposed.module()(images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_graph_does_not_grow_with_the_number_of_tokens():
    short, long = (decompose(program_of_a_block(side), {OPERATOR}) for side in (24, 96))
    assert len(long.graph.nodes) < 1.3 * len(short.graph.nodes) < 700


def test_no_tensor_holds_a_state_for_every_token():
    decomposed = decompose(program_of_a_block(side=32), {OPERATOR})
    elements_of_all_states = 2 * 32**2 * 16 * 4
    largest = max(
        node.meta["val"].numel()
        for node in decomposed.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    )
    assert largest < elements_of_all_states / 1.5
