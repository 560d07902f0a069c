import copy

import pytest
import torch
import torch.nn.functional as F
from batch_norms import norms_of, with_statistics
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from medlite.compression.norm_folding import find_folds, fold_norms


def folds_of(net, *sizes):
    net = with_statistics(net)
    folds, obstacles = find_folds(net, sizes)
    images = torch.randn(3, *sizes)
    expected = net(images)
    fold_norms(net, folds)
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
    return folds, obstacles


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (3, 8)),
        (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False), (4, 8, 8)),
        (nn.Conv2d(3, 4, 3, padding="same", bias=False), nn.BatchNorm2d(4, eps=0.1), (3, 8, 8)),
        (nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), (2, 4, 4, 4)),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4), (3, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (4, 4, 4)),
        (nn.ConvTranspose3d(4, 4, 2, groups=4), nn.BatchNorm3d(4), (4, 2, 2, 2)),
        (nn.Linear(5, 4), nn.BatchNorm1d(4), (5,)),
        (nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, affine=False), (5,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_folded_layer_computes_the_formula_of_batch_normalisation(layer, norm, shape):
    layer, norm = copy.deepcopy(layer), copy.deepcopy(norm)
    net = with_statistics(nn.Sequential(layer, norm))
    images = torch.randn(5, *shape)
    out = copy.deepcopy(layer).double()(images.double())
    as_channels = (1, -1, *[1] * (out.ndim - 2))
    mean, variance, scale, shift = (
        torch.as_tensor(value, dtype=torch.float64).view(as_channels)
        for value in (
            norm.running_mean,
            norm.running_var,
            norm.weight.detach() if norm.affine else [1.0],
            norm.bias.detach() if norm.affine else [0.0],
        )
    )
    expected = (out - mean) / (variance + norm.eps).sqrt() * scale + shift
    folds, obstacles = find_folds(net, shape)
    assert (folds, obstacles) == ({"1": "0"}, {})
    fold_norms(net, folds)
    assert not norms_of(net)
    torch.testing.assert_close(net(images).double(), expected, rtol=1e-5, atol=1e-5)


class Crossed(nn.Module):
    """Normalisations that stand behind other layers than those they are registered with."""

    def __init__(self):
        super().__init__()
        self.norm_of_b = nn.BatchNorm2d(4)
        self.a = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.b = nn.Conv2d(4, 4, 3)

    def forward(self, image):
        conv, norm = self.a
        return norm(self.b(F.relu(self.norm_of_b(conv(image)))))


def test_the_layer_of_a_norm_is_found_by_the_data_flow():
    folds, _ = folds_of(Crossed(), 1, 8, 8)
    assert folds == {"norm_of_b": "a.0", "a.1": "b"}


class Tokens(nn.Module):
    """(B, L, C) normalised over all tokens, as LevIT does it, and over (B, C, L)."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Linear(1, 4), nn.BatchNorm1d(4)
        self.second, self.norm2 = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.third, self.norm3 = nn.Linear(6, 9), nn.BatchNorm1d(9)

    def forward(self, tokens):
        hidden = self.norm1(self.first(tokens).flatten(0, 1)).unflatten(0, (-1, tokens.shape[1]))
        hidden = self.norm2(self.second(hidden.relu()).transpose(1, 2)).transpose(1, 2)
        # nine tokens of nine channels: here tokens are what is normalised
        return self.norm3(self.third(hidden.relu()))


def test_channels_are_followed_through_reshapes_and_transpositions():
    folds, obstacles = folds_of(Tokens(), 9, 1)
    assert folds == {"norm1": "first", "norm2": "second"}
    assert obstacles == {"norm3": "over another axis than the layer's channels"}


class Wired(nn.Module):
    """A convolution, a normalisation, and a way to wire them."""

    def __init__(self, wire, norm=None, conv=None):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(4)
        self.wire = wire

    def forward(self, image):
        return self.wire(self.stem(image), self.conv, self.norm)


class Doubling(nn.BatchNorm2d):
    def forward(self, features):
        return 2 * super().forward(features)


def in_a_row(features, conv, norm):
    return norm(conv(features))


def read_twice(features, conv, norm):
    out = conv(features)
    return norm(out) + out


STAYING = {
    "pre-activation": (
        Wired(lambda x, conv, norm: conv(norm(x.relu()))),
        "not behind a convolution or linear layer",
    ),
    "dropout between": (
        Wired(lambda x, conv, norm: norm(F.dropout(conv(x), 0.5, training=False))),
        "not behind a convolution or linear layer",
    ),
    "read twice": (Wired(read_twice), "behind a layer whose output is also read elsewhere"),
    "norm used twice": (
        Wired(lambda x, conv, norm: norm(conv(norm(x)))),
        "used more than once",
    ),
    "layer used twice": (
        Wired(lambda x, conv, norm: norm(conv(conv(x).relu()))),
        "behind a layer that is used more than once or shares its weights",
    ),
    "weight read elsewhere": (
        Wired(lambda x, conv, norm: norm(conv(x)) * conv.weight.mean()),
        "behind a layer that is used more than once or shares its weights",
    ),
    "no statistics": (
        Wired(in_a_row, norm=nn.BatchNorm2d(4, track_running_stats=False)),
        "without running statistics",
    ),
    "no tensors": (
        Wired(in_a_row, norm=nn.BatchNorm2d(4, affine=False, track_running_stats=False)),
        "without running statistics",
    ),
    "computed weight": (
        Wired(in_a_row, conv=weight_norm(nn.Conv2d(4, 4, 3))),
        "behind a layer whose weight or bias is computed",
    ),
    "ignored bias": (
        Wired(lambda x, conv, norm: norm(F.conv2d(x, conv.weight))),
        "behind a layer whose weight or bias is computed",
    ),
    "own kind": (
        Wired(in_a_row, norm=Doubling(4)),
        "in Doubling, which is no batch normalisation of torch or timm",
    ),
}


@pytest.mark.parametrize("case", STAYING)
def test_a_norm_that_cannot_be_folded_stays_and_the_reason_is_known(case):
    net, reason = STAYING[case]
    folds, obstacles = folds_of(copy.deepcopy(net), 1, 8, 8)
    assert (folds, obstacles) == ({}, {"norm": reason})


def test_a_norm_before_a_layer_stays_while_those_behind_it_are_folded():
    net = nn.Sequential(
        nn.MaxPool2d(2), nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4),
        nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4),
    )  # fmt: skip
    folds, obstacles = folds_of(net, 1, 8, 8)
    assert folds == {"3": "2", "6": "5"}
    assert list(obstacles) == ["1"]


def test_the_activation_within_a_norm_of_timm_stays():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU))
    folds, _ = folds_of(net, 1, 8, 8)
    assert folds == {"1": "0"}
    assert isinstance(net[1].act, nn.SiLU)


class Tied(nn.Module):
    """A layer whose weight another layer has too, which is not run."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, bias=False), nn.BatchNorm2d(1)
        self.idle = nn.Conv2d(1, 1, 3, bias=False)
        self.idle.weight = self.conv.weight

    def forward(self, image):
        return self.norm(self.conv(image))


def test_a_layer_that_shares_its_weight_is_left_alone():
    folds, obstacles = folds_of(Tied(), 1, 8, 8)
    reason = "behind a layer that is used more than once or shares its weights"
    assert (folds, obstacles) == ({}, {"norm": reason})
