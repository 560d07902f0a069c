import torch
from torch import nn

from medlite.compression.structure import record_structure, restore_structure


class Tied(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(4, width, bias=False)
        self.again = nn.Linear(4, width, bias=False)
        self.again.weight = self.first.weight
        self.norm = nn.LayerNorm(width)
        self.register_buffer("centre", torch.ones(width))

    def forward(self, features):
        return self.norm(self.first(features) + self.again(features) - self.centre)


def test_only_what_differs_is_recorded():
    structure = record_structure(Tied(6), Tied(3))
    assert structure["shapes"] == {
        "first.weight": [3, 4],
        "again.weight": [3, 4],
        "norm.weight": [3],
        "norm.bias": [3],
        "centre": [3],
    }
    assert structure["attributes"] == {
        "first": {"out_features": 3},
        "again": {"out_features": 3},
        "norm": {"normalized_shape": (3,)},
    }
    assert record_structure(Tied(6), Tied(6)) == {"shapes": {}, "attributes": {}}


def test_a_restored_net_computes_what_the_changed_one_did():
    changed, net = Tied(3), Tied(6)
    restore_structure(net, record_structure(Tied(6), changed))
    net.load_state_dict(changed.state_dict(), strict=True)
    features = torch.randn(2, 4)
    assert torch.equal(net(features), changed(features))


def test_tied_tensors_stay_tied():
    net = Tied(6)
    restore_structure(net, record_structure(Tied(6), Tied(3)))
    assert net.first.weight is net.again.weight


class Shared(nn.Module):
    """Modules with two names each, among tensors of many sizes."""

    def __init__(self, widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, width) for width in widths)
        self.again = nn.ModuleList(self.layers)
        self.tied = nn.Linear(4, widths[0])
        self.tied.weight = self.layers[0].weight


def test_modules_with_two_names_keep_their_sizes():
    changed, net = Shared(range(2, 42)), Shared(range(3, 43))
    restore_structure(net, record_structure(Shared(range(3, 43)), changed))
    net.load_state_dict(changed.state_dict(), strict=True)
    assert [layer.weight.shape[0] for layer in net.again] == list(range(2, 42))
    assert net.again[0] is net.layers[0]
    assert net.tied.weight is net.layers[0].weight
