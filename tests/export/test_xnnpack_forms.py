"""What is said in XNNPACK's words is what torch's operators say."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medlite.export.xnnpack_forms import XNNPACK_FORMS

CASES = {
    "unsqueeze": lambda x: torch.cat([x.unsqueeze(2).flatten(), x.unsqueeze(-1).flatten()]),
    "squeeze": lambda x: x[:, :1].squeeze(1).unsqueeze(0).squeeze((0, 1)),
    "select": lambda x: x[:, 1] - x.select(1, -1),
    "split": lambda x: torch.cat(x.split([1, 3, 2], 1)[::-1], 1) - torch.cat(x.chunk(3, 1), 1),
    "split evenly": lambda x: torch.cat(x.split(4, 1)[::-1], 1) - torch.cat(x.chunk(4, 1), 1),
    "softmax": lambda x: x.softmax(-1) + x.softmax(1) + x.softmax(2, dtype=torch.float32),
    "softplus": lambda x: F.softplus(x) + F.softplus(x, beta=2.0),
    "group_norm": lambda x: F.group_norm(x, 3) + F.group_norm(x, 2, x[0, :, 0, 0], x[0, :, 0, 1]),
    "mean": lambda x: x.mean() + x.mean(1, True) + x.mean((2, 3), True) + x.mean((3, -3))[0, 0],
}


class Case(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return CASES[self.name](x)


def in_xnnpacks_words(module, x):
    program = torch.export.export(module, (x,)).run_decompositions(XNNPACK_FORMS)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return program.module(), targets


@pytest.mark.parametrize("name", CASES)
def test_form_computes_what_the_operator_does_and_replaces_it(name):
    x = torch.randn(1, 6, 4, 5, generator=torch.Generator().manual_seed(0)) * 3
    found, targets = in_xnnpacks_words(Case(name), x)
    assert not (targets & XNNPACK_FORMS.keys()) - {torch.ops.aten.mean.dim}
    torch.testing.assert_close(found(x), Case(name)(x), rtol=1e-6, atol=1e-6)


def test_softplus_is_exact_to_the_last_bits_from_tiny_to_large():
    x = torch.linspace(-80, 30, 11001)
    found, _ = in_xnnpacks_words(nn.Softplus(), x)
    expected = F.softplus(x.double(), threshold=100)
    assert float(((found(x) - expected) / expected).abs().max()) < 4e-7


@pytest.mark.parametrize("dims", [(1,), (0, 3), (2, 3), (-1,)])
def test_mean_is_over_the_last_two_axes_of_four(dims):
    x = torch.randn(1, 2, 3, 4)
    net = Case("mean")
    net.forward = lambda x: x.mean(dims)
    program = torch.export.export(net, (x,)).run_decompositions(XNNPACK_FORMS)
    mean = next(node for node in program.graph.nodes if "mean" in str(node.target))
    assert mean.args[0].meta["val"].ndim == 4
    assert list(mean.args[1:]) == [[2, 3], True]


def test_softmax_is_over_rows_of_a_matrix():
    x = torch.randn(1, 2, 3, 4)
    program = torch.export.export(nn.Softmax(dim=-1), (x,)).run_decompositions(XNNPACK_FORMS)
    softmax = next(node for node in program.graph.nodes if "softmax" in str(node.target))
    assert softmax.meta["val"].ndim == 2
