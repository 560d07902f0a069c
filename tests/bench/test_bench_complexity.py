"""Parameters and multiply-adds are those that a hand count gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medlite.bench.complexity import measure_complexity, write_layers
from medlite.compression.quantized_graph import calibrate, convert, prepare
from medlite.compression.quantizer import Int8Quantizer
from medlite.export.layer_costs import count_layers, total
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


class Attending(nn.Module):
    """Attention over the 64 pixels in one head of 3 channels."""

    def forward(self, images):
        tokens = images.flatten(2).transpose(1, 2)[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


class Encoding(nn.Module):
    """torch's own transformer layer, which has a fused form for evaluation."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)

    def forward(self, images):
        return self.layer(images.reshape(-1, 16, 12))


def count(net):
    whole = total(count_layers(net, SHAPE))
    return whole.params, whole.macs


def test_measurements_are_the_totals_in_their_units():
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Scanning())
    layers = count_layers(net, SHAPE)
    whole, values = total(layers), {m.name: m.value for m in measure_complexity(layers, SHAPE)}
    assert values == {
        "complexity/params": whole.params,
        "complexity/gmacs": whole.macs / 1e9,
        "complexity/gflops": whole.flops / 1e9,
        "complexity/activations_m": whole.activations / 1e6,
        "complexity/memory_access_mib": whole.memory_access_bytes / 2**20,
    }


def test_convolution_and_linear_match_the_closed_form():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    params, macs = count(net)
    assert params == (3 * 9 + 1) * 4 + (256 + 1) * 2
    assert macs == pytest.approx(3 * 9 * 4 * 64 + 256 * 2)


def test_selective_scan_counts_by_its_formula_and_holds_no_multiply_adds():
    whole = total(count_layers(Scanning(), SHAPE))
    assert whole.flops == 9 * 64 * 3 * 5 + 2 * 64 * 3
    assert whole.macs == 0


def test_fused_attention_counts_as_its_two_products():
    whole = total(count_layers(Attending(), SHAPE))
    assert whole.macs == 2 * 64 * 64 * 3
    assert whole.flops == 2 * whole.macs


def test_fast_path_of_torchs_transformer_layer_hides_nothing():
    linear = 16 * (12 * 36 + 12 * 12 + 12 * 24 + 24 * 12)
    attention = 2 * 16 * 16 * 12
    assert count(Encoding())[1] == linear + attention


def test_memory_traffic_of_a_convolution_is_its_input_output_and_weights():
    """Guideline 1 of ShuffleNet V2: h w (c1 + c2) + c1 c2 for 1x1, and here a bias."""
    whole = total(count_layers(nn.Conv2d(3, 4, 1), SHAPE))
    assert whole.memory_access_bytes == 4 * (64 * (3 + 4) + 3 * 4 + 4)
    assert whole.activations == 4 * 64


def test_views_move_nothing():
    views = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 48)))
    assert total(count_layers(views, SHAPE)).memory_access_bytes == 0


def test_every_layer_has_its_own_costs():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    conv, relu, point = count_layers(net, SHAPE)
    assert [cost.layer for cost in (conv, relu, point)] == ["0", "1", "2"]
    assert (conv.params, point.params, relu.params) == (112, 8, 0)
    assert (conv.macs, point.macs, relu.macs) == (64 * 108, 64 * 8, 0)
    assert relu.memory_access_bytes == 4 * 2 * 4 * 64


def test_weights_that_two_layers_share_count_once():
    shared = nn.Linear(8, 8)
    whole = total(count_layers(nn.Sequential(shared, nn.ReLU(), shared), SHAPE))
    assert whole.params == 72
    assert whole.macs == 2 * 24 * 64


def test_reparameterised_network_counts_as_it_is_deployed():
    params, macs = count(Reparameterisable())
    assert params == (3 * 9 + 1) * 4
    assert macs == pytest.approx(3 * 9 * 4 * 64)


def test_quantised_graph_counts_as_its_float_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    quantizer = Int8Quantizer(keep_first_float=False, keep_last_float=False, keep_float=())
    prepared = prepare(net, SHAPE, quantizer)
    calibrate(prepared, torch.randn(8, *SHAPE), batch_size=8, method="minmax")
    quantized, plain = count_layers(convert(prepared, SHAPE), SHAPE), count_layers(net, SHAPE)
    costs = {c.layer: (c.params, c.macs, c.activations) for c in quantized if c.layer}
    assert costs == {c.layer: (c.params, c.macs, c.activations) for c in plain}


def test_layers_are_written_as_a_table(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1, bias=False))
    write_layers({"deployed": count_layers(net, SHAPE)}, tmp_path / "layers.csv")
    head, first, second = (tmp_path / "layers.csv").read_text().splitlines()
    assert head == "candidate,layer,params,macs,flops,activations,memory_access_bytes"
    assert first.startswith("deployed,0,112,6912,13824,256,")
    assert second.startswith("deployed,1,8,512,1024,128,")
