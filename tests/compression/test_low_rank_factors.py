import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medlite.compression.low_rank_factors import (
    Positions,
    factor_shapes,
    factorised,
    factors,
    full_ranks,
    kept_energy,
    num_macs,
)

CONVOLUTIONS = {
    "plain": nn.Conv2d(9, 10, 3),
    "strided": nn.Conv2d(9, 10, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(9, 10, (3, 5), padding=(2, 4), dilation=2, bias=False),
    "reflected": nn.Conv2d(9, 10, 3, padding=1, padding_mode="reflect"),
    "same": nn.Conv2d(9, 10, 4, padding="same"),
    "volume": nn.Conv3d(9, 10, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
    "replicated_volume": nn.Conv3d(9, 10, 3, padding=1, padding_mode="replicate"),
    "patch": nn.Conv2d(9, 10, 4, stride=4),
}

POINTWISE = {
    "linear": nn.Linear(9, 12),
    "linear_without_bias": nn.Linear(12, 9, bias=False),
    "image": nn.Conv2d(9, 12, 1),
    "strided": nn.Conv2d(9, 12, 1, stride=2),
    "padded": nn.Conv2d(9, 12, 1, padding=2),
    "volume": nn.Conv3d(12, 9, 1, stride=(1, 2, 1)),
}


def features_for(layer, channels=9, side=9):
    generator = torch.Generator().manual_seed(3)
    if isinstance(layer, nn.Linear):
        return torch.randn(2, 5, layer.in_features, generator=generator)
    sides = [side] * len(layer.kernel_size)
    return torch.randn(2, layer.in_channels, *sides, generator=generator)


def thin(layer, ranks):
    return factorised(layer, factors(layer, ranks))


def product(layer, weights):
    """The weight that the factors amount to, by numpy."""
    numbers = [weight.double().numpy() for weight in weights]
    if len(numbers) == 2:
        return numbers[1].reshape(len(numbers[1]), -1) @ numbers[0].reshape(len(numbers[0]), -1)
    first, core, last = (some.reshape(*some.shape[:2], -1) for some in numbers)
    whole = np.einsum("nr,rik,im->nmk", last[..., 0], core, first[..., 0])
    return whole.reshape(layer.weight.shape)


def error(layer, weights):
    weight = layer.weight.detach().double().numpy()
    return np.linalg.norm(weight - product(layer, weights).reshape(weight.shape))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_at_full_ranks_a_convolution_stays_what_it_was(name):
    layer = CONVOLUTIONS[name].eval()
    features = features_for(layer)
    three = thin(layer, full_ranks(layer))
    assert [part.bias is None for part in three] == [True, True, layer.bias is None]
    assert torch.allclose(three(features), layer(features), atol=1e-5)


@pytest.mark.parametrize("name", POINTWISE)
def test_at_full_rank_a_pointwise_layer_stays_what_it_was(name):
    layer = POINTWISE[name].eval()
    features = features_for(layer)
    two = thin(layer, full_ranks(layer))
    assert len(two) == 2
    assert torch.allclose(two(features), layer(features), atol=1e-5)


def test_a_matrix_loses_what_eckart_and_young_say():
    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    values = np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)
    for rank in (1, 5, 11):
        assert error(layer, factors(layer, (rank,))) == pytest.approx(
            math.sqrt((values[rank:] ** 2).sum()), rel=1e-5
        )


def test_a_matrix_shares_its_singular_values_evenly():
    torch.manual_seed(0)
    first, last = factors(nn.Linear(12, 20), (5,))
    assert torch.allclose(first.norm(dim=1), last.norm(dim=0), rtol=1e-5)


def test_a_kernel_of_low_ranks_is_found_exactly():
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 14, 3)
    core, left, right = torch.randn(4, 3, 3, 3), torch.randn(14, 4), torch.randn(3, 12)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("nr,rihw,im->nmhw", left, core, right))
    assert kept_energy(layer)[3, 2] == pytest.approx(1.0, abs=1e-9)
    assert kept_energy(layer)[3, 1] < 0.999
    assert error(layer, factors(layer, (4, 3))) < 1e-5 * layer.weight.norm().item()


def test_the_energy_of_a_kernel_is_what_truncating_its_bases_keeps():
    torch.manual_seed(0)
    layer = nn.Conv3d(6, 8, 2)
    weight = layer.weight.detach().double().numpy().reshape(8, 6, 8)
    out_basis = np.linalg.svd(weight.reshape(8, -1))[0]
    in_basis = np.linalg.svd(weight.transpose(1, 0, 2).reshape(6, -1))[0]
    for rank, in_rank in ((1, 1), (5, 2), (8, 3), (8, 6)):
        left, right = out_basis[:, :rank], in_basis[:, :in_rank]
        projected = np.einsum("an,nmk,mb->abk", left @ left.T, weight, right @ right.T)
        expected = (projected**2).sum() / (weight**2).sum()
        assert kept_energy(layer)[rank - 1, in_rank - 1] == pytest.approx(expected, rel=1e-9)


def test_orthogonal_iteration_is_near_its_end():
    """Random weights are the hardest; fifty sweeps by numpy, and what truncation alone leaves."""
    torch.manual_seed(1)
    layer = nn.Conv2d(16, 16, 3)
    weight = layer.weight.detach().double().numpy().reshape(16, 16, 9)
    right = np.eye(16)
    for _ in range(50):
        left = np.linalg.svd(np.einsum("nmk,mi->nik", weight, right).reshape(16, -1))[0][:, :4]
        right = np.linalg.svd(np.einsum("nmk,nr->mrk", weight, left).reshape(16, -1))[0][:, :4]
    kept = np.linalg.norm(np.einsum("nmk,nr,mi->rik", weight, left, right))
    _, core, _ = factors(layer, (4, 4))
    truncated = kept_energy(layer)[3, 3].sqrt() * np.linalg.norm(weight)
    assert core.norm() > 1.05 * truncated
    assert core.norm() > 0.999 * kept


def test_weights_of_zero_lose_nothing():
    layer = nn.Conv2d(4, 4, 3)
    nn.init.zeros_(layer.weight)
    assert kept_energy(layer).eq(1).all()
    assert all(part.isfinite().all() for part in factors(layer, (2, 2)))


@pytest.mark.parametrize(
    ("layer", "ranks"),
    [
        (POINTWISE["linear"], (3,)),
        (POINTWISE["strided"], (3,)),
        (CONVOLUTIONS["strided"], (4, 5)),
        (CONVOLUTIONS["dilated"], (4, 5)),
        (CONVOLUTIONS["volume"], (7, 2)),
    ],
)
def test_multiply_adds_are_those_that_torch_counts(layer, ranks):
    features = features_for(layer)[:1]
    shape = layer(features).shape
    places = (features.numel() // layer.weight.shape[1], math.prod(shape) // layer.weight.shape[0])
    at = Positions(*places)
    for some, net in ((ranks, thin(layer, ranks)), ((), layer)):
        with FlopCounterMode(display=False) as counter:
            net(features)
        assert num_macs(layer, at, some) == counter.get_total_flops() // 2


@pytest.mark.parametrize("layer", [POINTWISE["volume"], CONVOLUTIONS["volume"]])
def test_shapes_are_known_without_the_weights(layer):
    ranks = full_ranks(layer)
    assert [tuple(weight.shape) for weight in factors(layer, ranks)] == factor_shapes(layer, ranks)


def test_making_the_layers_draws_no_random_numbers():
    layer = CONVOLUTIONS["plain"]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    thin(layer, (4, 4))
    assert torch.equal(torch.rand(1), expected)


def test_frozen_weights_stay_frozen():
    layer = nn.Linear(8, 8).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in thin(layer, (2,)).parameters())
