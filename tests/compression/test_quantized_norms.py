"""Batch normalisations on the way to a quantised graph: nothing but rounding changes the net."""

import copy

import pytest
import torch
from batch_norms import with_statistics
from torch import nn
from toy_world import make_context, make_spec

from medlite.compression.nncf_quantization import NncfQuantization
from medlite.compression.quantization import PostTrainingQuantization
from medlite.compression.quantized_graph import prepare
from medlite.compression.quantizer import Int8Quantizer
from medlite.errors import ExportError
from medlite.models.monai_network import MonaiNetwork

SIZE = 16


class Wired(nn.Module):
    """Two convolutions, a body that a function wires, and a head."""

    def __init__(self, wire, *parts):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.parts, self.head = nn.ModuleList(parts), nn.Conv2d(8, 2, 1)
        self.wire = wire

    def forward(self, image):
        features = self.conv(self.stem(image).relu()).relu()
        return self.head(self.wire(features, *self.parts))


class Deploying(Wired):
    def deploy(self):
        deployed = Wired(self.wire, *self.parts)
        deployed.load_state_dict(self.state_dict())
        return copy.deepcopy(deployed)


def conv():
    return nn.Conv2d(8, 8, 3, padding=1)


def norm(**options):
    return nn.BatchNorm2d(8, **options)


def block(*, bias):
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=bias), norm(), nn.ReLU())


def with_skip(features, conv, norm):
    out = conv(features)
    return out + norm(out).relu()


def under_two_norms(features, conv, first, second):
    return second(conv(first(conv(features)).relu())).relu()


def in_a_row(features, *parts):
    for part in parts:
        features = part(features)
    return features


NETS = {
    "read by its norm and by a skip": Wired(with_skip, conv(), norm()),
    "one convolution under two norms": Wired(under_two_norms, conv(), norm(), norm()),
    "a block called twice": Wired(lambda x, part: part(part(x)), block(bias=True)),
    "a block without a bias called twice": Wired(lambda x, part: part(part(x)), block(bias=False)),
    "two norms in a row": Wired(in_a_row, conv(), norm(), norm(), nn.ReLU()),
    "a norm before any layer": Wired(in_a_row, norm(), conv(), nn.ReLU()),
    "without weights": Wired(in_a_row, norm(affine=False), conv(), norm(affine=False)),
    "a transposed convolution": Wired(
        in_a_row, nn.ConvTranspose2d(8, 8, 3, padding=1), norm(), nn.ReLU()
    ),
    "a grouped transposed convolution": Wired(
        in_a_row, nn.ConvTranspose2d(8, 8, 3, padding=1, groups=4), norm(), nn.ReLU()
    ),
    "a grouped convolution": Wired(
        in_a_row, nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), norm(eps=0.1), nn.ReLU()
    ),
    "deployed": Deploying(with_skip, conv(), norm()),
}


def prepared(net, input_shape=(1, SIZE, SIZE), **options):
    defaults = {"keep_first_float": True, "keep_last_float": True, "keep_float": ()}
    return prepare(net, input_shape, Int8Quantizer(**(defaults | options)))


def assert_equal_but_for_float32(graph, net, images):
    expected, logits = net(images), graph(images)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", NETS)
def test_without_rounding_a_prepared_net_is_the_float_net(case):
    net = with_statistics(copy.deepcopy(NETS[case]))
    assert_equal_but_for_float32(prepared(net), net, torch.randn(3, 1, SIZE, SIZE))


def test_without_rounding_a_prepared_net_of_monai_is_the_float_net():
    torch.manual_seed(0)
    net = MonaiNetwork(in_channels=3, num_classes=4, name="SegResNetDS")
    images = 2 * torch.randn(4, 3, 32, 32) + 1
    with torch.no_grad():
        for _ in range(5):
            net.train()(images)
    assert_equal_but_for_float32(prepared(net.eval(), (3, 32, 32)), net, images)


@pytest.mark.parametrize("case", NETS)
def test_every_parameter_of_a_prepared_net_learns(case):
    net = with_statistics(copy.deepcopy(NETS[case]))
    graph = prepared(net)
    graph(torch.randn(3, 1, SIZE, SIZE)).square().mean().backward()
    statistics = {name for name, parameter in graph.named_parameters() if parameter.grad is None}
    assert bool(statistics) == (case == "without weights")
    assert all(not graph.get_parameter(name).requires_grad for name in statistics)


def test_optimisers_see_a_norm_that_stays_as_vectors():
    """They spare vectors the weight decay."""
    graph = prepared(with_statistics(Wired(in_a_row, norm(), conv())))
    shapes = {name: tuple(p.shape) for name, p in graph.named_parameters() if "norm" in name}
    assert shapes == {"batch_norm_scale": (8,), "batch_norm_shift": (8,)}


def test_what_is_frozen_stays_frozen_and_what_it_is_folded_into_as_well():
    parts = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(), nn.ReLU(), norm()
    net = with_statistics(Wired(in_a_row, *parts))
    frozen = net.stem, net.parts[0], net.parts[1], net.parts[3].bias
    for part in frozen:
        part.requires_grad_(False)
    parameters = dict(prepared(net).named_parameters())
    assert {name for name, parameter in parameters.items() if not parameter.requires_grad} == {
        "stem.weight", "stem.bias", "parts.0.weight", "parts.0.bias", "batch_norm_shift",
    }  # fmt: skip
    assert {"conv.weight", "conv.bias", "batch_norm_scale", "head.bias"} < parameters.keys()


def test_a_quantised_net_with_norms_that_stay_reloads_strictly():
    spec, step = make_spec(), PostTrainingQuantization(calibration_samples=4)
    net = with_statistics(copy.deepcopy(NETS["read by its norm and by a skip"]))
    quantised, state = step.apply(net, make_context(spec))
    fresh = with_statistics(copy.deepcopy(NETS["read by its norm and by a skip"]), seed=1)
    restored = step.restore(fresh, state, spec)
    restored.load_state_dict(quantised.state_dict(), strict=True)
    images = torch.randn(2, *spec.input_shape)
    assert torch.equal(restored(images), quantised(images))


def test_nncf_is_given_no_norm_to_fold():
    pytest.importorskip("nncf")
    net = with_statistics(copy.deepcopy(NETS["read by its norm and by a skip"]))
    context = make_context(make_spec())
    step = NncfQuantization(calibration_samples=4, bias_correction="none")
    quantised, _ = step.apply(net, context)
    images = context.calibration_images(4)
    expected = net(images)
    assert (quantised(images) - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_norm_without_running_statistics_is_refused_by_its_name():
    net = Wired(in_a_row, norm(track_running_stats=False), conv(), nn.ReLU()).eval()
    with pytest.raises(ExportError, match=r"'parts.0' has no running statistics, .* set track_"):
        prepared(net)
