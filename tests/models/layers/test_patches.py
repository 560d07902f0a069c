"""Merging and expanding patches against the order that the published weights expect."""

import torch
from torch import nn

from medlite.models.layers.patches import PatchExpanding, PatchMerging


def test_merging_stacks_the_four_pixels_of_a_square_column_by_column():
    torch.manual_seed(0)
    layer, maps = PatchMerging(3), torch.randn(2, 4, 6, 3)
    corners = [maps[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    expected = layer.reduction(layer.norm(torch.cat(corners, dim=-1)))
    torch.testing.assert_close(layer(maps), expected)


def test_merging_fills_odd_sides_with_zeros():
    torch.manual_seed(0)
    layer, maps = PatchMerging(3), torch.randn(2, 3, 5, 3)
    padded = torch.zeros(2, 4, 6, 3)
    padded[:, :3, :5] = maps
    assert layer(maps).shape == (2, 2, 3, 6)
    torch.testing.assert_close(layer(maps), layer(padded))


def test_expanding_lays_the_new_tokens_out_row_by_row():
    layer = PatchExpanding(8, 2, scale=2)
    layer.expand.weight.data, layer.norm = torch.eye(8), nn.Identity()
    maps = torch.arange(16.0).view(1, 1, 2, 8)
    expected = [[[0, 1], [2, 3], [8, 9], [10, 11]], [[4, 5], [6, 7], [12, 13], [14, 15]]]
    assert torch.equal(layer(maps), torch.tensor([expected]).float())
