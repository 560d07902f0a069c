"""The Mamba block against its equations, written out token by token."""

import pytest
import torch
import torch.nn.functional as F

from medlite.models.layers import mamba
from medlite.models.layers.mamba import MambaBlock, mamba_block
from medlite.models.layers.ssm import Ssm

SSD = Ssm(kind="ssd", d_state=16, head_dim=8)


def make_lively_block(channels, ssm=None):
    """A block whose state weighs as much in the output as the direct path, unlike a fresh one."""
    torch.manual_seed(0)
    block = MambaBlock(channels) if ssm is None else mamba_block(channels, ssm)
    with torch.no_grad():
        block.x_proj.weight.mul_(10)
        block.dt_proj.bias.add_(3)
    return block


def mix_sequentially(block, tokens):
    """Section 3.4 of the paper as a loop over tokens, with the state held explicitly."""
    weights = {name: value.detach() for name, value in block.state_dict().items()}
    x, gate = F.linear(tokens, weights["in_proj.weight"]).chunk(2, dim=-1)
    kernel, taps = weights["conv1d.weight"][:, 0], weights["conv1d.weight"].shape[-1]
    rank = weights["dt_proj.weight"].shape[1]
    A = -weights["A_log"].exp()
    head_dim = x.shape[-1] // len(A)
    if A.ndim == 1:
        A = A.repeat_interleave(head_dim)[:, None].expand(-1, 16)
    history = [torch.zeros_like(x[:, 0])] * (taps - 1)
    state, outputs = torch.zeros(len(x), *A.shape), []
    for t in range(x.shape[1]):
        history = [*history[-taps:], x[:, t]]
        window = torch.stack(history[-taps:], dim=-1)
        u = F.silu((window * kernel).sum(-1) + weights["conv1d.bias"])
        dt, B, C = F.linear(u, weights["x_proj.weight"]).tensor_split([rank, rank + 16], dim=-1)
        delta = F.softplus(F.linear(dt, weights["dt_proj.weight"], weights["dt_proj.bias"]))
        delta = delta.repeat_interleave(head_dim, dim=-1)
        state = torch.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None]
        y = (state * C[:, None]).sum(-1) + weights["D"] * u
        outputs.append(F.linear(y * F.silu(gate[:, t]), weights["out_proj.weight"]))
    return torch.stack(outputs, dim=1)


def test_block_equals_the_loop_over_tokens():
    block, tokens = make_lively_block(24), torch.randn(2, 21, 24)
    torch.testing.assert_close(block(tokens), mix_sequentially(block, tokens))


def test_parameters_have_the_published_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in MambaBlock(24).state_dict().items()}
    assert shapes == {
        "A_log": (48, 16),
        "D": (48,),
        "in_proj.weight": (96, 24),
        "conv1d.weight": (48, 1, 4),
        "conv1d.bias": (48,),
        "x_proj.weight": (2 + 32, 48),
        "dt_proj.weight": (48, 2),
        "dt_proj.bias": (48,),
        "out_proj.weight": (24, 48),
    }


def test_block_of_heads_equals_the_loop_over_tokens():
    block, tokens = make_lively_block(24, SSD), torch.randn(2, 37, 24)
    torch.testing.assert_close(block(tokens), mix_sequentially(block, tokens))


def test_heads_change_the_steps_and_rates_and_nothing_else():
    shapes, head_shapes = (
        {name: tuple(value.shape) for name, value in block.state_dict().items()}
        for block in (MambaBlock(24), mamba_block(24, SSD))
    )
    expected = {"A_log": (6,), "dt_proj.weight": (6, 2), "dt_proj.bias": (6,)}
    assert head_shapes == shapes | expected


def test_initial_rates_of_heads_are_uniform_between_1_and_16():
    torch.manual_seed(0)
    rates = mamba_block(2000, Ssm(kind="ssd", head_dim=1)).A_log.exp()
    quartiles = rates.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(
        quartiles, torch.tensor([1.0, 4.75, 8.5, 12.25, 16]), atol=0.4, rtol=0
    )


def test_initial_steps_are_log_uniform_between_a_thousandth_and_a_tenth():
    torch.manual_seed(0)
    delta = F.softplus(MambaBlock(2000, d_state=2).dt_proj.bias)
    quartiles = delta.log10().quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(
        quartiles, torch.tensor([-3.0, -2.5, -2, -1.5, -1]), atol=0.05, rtol=0
    )


def test_no_token_sees_a_later_one():
    block, tokens = make_lively_block(8), torch.randn(1, 12, 8, requires_grad=True)
    block(tokens)[:, 5].sum().backward()
    assert tokens.grad[:, 6:].abs().max() == 0
    assert (tokens.grad[:, :6].abs().amax(-1) > 0).all()


def test_block_works_with_pruned_inner_channels():
    block, tokens = make_lively_block(8), torch.randn(1, 12, 8)
    with torch.no_grad():
        block.out_proj.weight[:, 10:] = 0
        block.x_proj.weight[:, 10:] = 0
    expected = block(tokens)
    keep_linear_rows = torch.cat([torch.arange(10), 16 + torch.arange(10)])
    block.in_proj.weight.data = block.in_proj.weight.data[keep_linear_rows]
    block.conv1d.groups = 10
    for parameter in (block.conv1d.weight, block.conv1d.bias, block.A_log, block.D):
        parameter.data = parameter.data[:10]
    for parameter in (block.dt_proj.weight, block.dt_proj.bias):
        parameter.data = parameter.data[:10]
    for layer in (block.x_proj, block.out_proj):
        layer.weight.data = layer.weight.data[:, :10]
    torch.testing.assert_close(block(tokens), expected)


@pytest.mark.parametrize(("name", "ssm"), [("selective_scan", None), ("ssd_scan", SSD)])
def test_replacing_the_scan_by_the_identity_is_noticed(monkeypatch, name, ssm):
    block, tokens = make_lively_block(8, ssm), torch.randn(1, 12, 8)
    expected = mix_sequentially(block, tokens)
    monkeypatch.setattr(mamba, name, lambda x, *_: x)
    assert (block(tokens) - expected).abs().max() > 0.5 * expected.abs().max()
