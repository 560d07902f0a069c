"""Parameters and multiply-adds are those that a hand count gives."""

import pytest
import torch
from torch import nn

from medlite.bench.complexity import count_complexity
from medlite.compression.quantized_graph import calibrate, convert, prepare
from medlite.compression.quantizer import Int8Quantizer
from medlite.models.layers.scans.selective import selective_scan

SHAPE = (3, 8, 8)


class Scanning(nn.Module):
    """A scan over the pixels, L = 64, D = 3, with N = 5 states."""

    def forward(self, images):
        tokens = images.flatten(2).transpose(1, 2)
        rates, weights = -torch.ones(3, 5), torch.ones(len(tokens), 64, 5)
        return selective_scan(tokens, tokens.abs(), rates, weights, weights, torch.ones(3))


class Reparameterisable(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in range(3))

    def forward(self, images):
        return sum(branch(images) for branch in self.branches)

    def deploy(self):
        return nn.Conv2d(3, 4, 3, padding=1)


def count(net):
    params, gmacs = count_complexity(net, SHAPE)
    assert (params.name, gmacs.name) == ("complexity/params", "complexity/gmacs")
    return params.value, gmacs.value * 1e9


def test_convolution_and_linear_match_the_closed_form():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    params, macs = count(net)
    assert params == (3 * 9 + 1) * 4 + (256 + 1) * 2
    assert macs == pytest.approx(3 * 9 * 4 * 64 + 256 * 2)


def test_selective_scan_counts_by_its_formula():
    _, macs = count(Scanning())
    assert macs == pytest.approx((9 * 64 * 3 * 5 + 2 * 64 * 3) / 2)


def test_reparameterised_network_counts_as_it_is_deployed():
    params, macs = count(Reparameterisable())
    assert params == (3 * 9 + 1) * 4
    assert macs == pytest.approx(3 * 9 * 4 * 64)


def test_quantised_graph_counts_as_its_float_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    quantizer = Int8Quantizer(keep_first_float=False, keep_last_float=False, keep_float=())
    prepared = prepare(net, SHAPE, quantizer)
    calibrate(prepared, torch.randn(8, *SHAPE), batch_size=8, method="minmax")
    assert count(convert(prepared, SHAPE)) == count(net)
