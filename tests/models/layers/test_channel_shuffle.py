"""The channel shuffle against indices and its inverse."""

import torch

from medlite.models.layers.channel_shuffle import channel_shuffle


def test_one_channel_of_each_group_comes_in_turn():
    maps = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert channel_shuffle(maps, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_shuffling_by_the_size_of_a_group_undoes_it():
    maps = torch.arange(24.0).reshape(2, 12, 1, 1)
    assert torch.equal(channel_shuffle(channel_shuffle(maps, 3), 4), maps)
