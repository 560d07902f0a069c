"""The four reading directions against lists of pixels."""

import pytest
import torch

from medlite.models.layers.scans.directions import cross_merge, cross_scan

SIZES = [(3, 5), (4, 2), (1, 3)]


def pixels_in_order(height, width):
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_each_direction_reads_its_own_map_in_its_order(height, width):
    maps = torch.randn(2, 4, height, width, 3)
    tokens = cross_scan(maps)
    assert tokens.shape == (2, 4, height * width, 3)
    for k, pixels in enumerate(pixels_in_order(height, width)):
        for t, (i, j) in enumerate(pixels):
            assert torch.equal(tokens[:, k, t], maps[:, k, i, j])


def test_a_shared_map_is_read_by_all_directions():
    maps = torch.randn(2, 1, 3, 4, 5)
    assert torch.equal(cross_scan(maps), cross_scan(maps.repeat(1, 4, 1, 1, 1)))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_merging_adds_each_token_at_its_pixel(height, width):
    tokens = torch.randn(2, 4, height * width, 3, dtype=torch.float64)
    expected = torch.zeros(2, height, width, 3, dtype=torch.float64)
    for k, pixels in enumerate(pixels_in_order(height, width)):
        for t, (i, j) in enumerate(pixels):
            expected[:, i, j] += tokens[:, k, t]
    torch.testing.assert_close(cross_merge(tokens, (height, width)), expected)
