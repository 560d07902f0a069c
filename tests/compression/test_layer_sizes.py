import torch
from torch import nn

from medlite.compression.layer_sizes import run_without_data, sync_sizes


def shortened(layer, *shape):
    layer.weight = nn.Parameter(torch.zeros(shape))
    sync_sizes(layer)
    return layer


def test_a_depthwise_convolution_stays_one():
    layer = shortened(nn.Conv2d(6, 12, 3, groups=6), 8, 1, 3, 3)
    assert (layer.in_channels, layer.out_channels, layer.groups) == (4, 8, 4)


def test_other_groups_stay_as_many():
    layer = shortened(nn.Conv2d(8, 8, 3, groups=4), 4, 1, 3, 3)
    assert (layer.in_channels, layer.out_channels, layer.groups) == (4, 4, 4)


def test_a_copy_of_the_groups_follows():
    block = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6))
    block.groups = 6
    block[0].weight = nn.Parameter(torch.zeros(4, 1, 3, 3))
    sync_sizes(block)
    assert block.groups == 4


def test_normalisations_without_weights_learn_their_size():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.InstanceNorm2d(6))
    assert run_without_data(net, torch.zeros(2, 1, 5, 5)) == (2, 4, 5, 5)
    assert net[1].num_features == 4


def test_a_net_that_fails_has_no_shape():
    assert run_without_data(nn.Linear(3, 2), torch.zeros(2, 4)) is None
