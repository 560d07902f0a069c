"""The four ways in which a 2-D scan reads a map as a sequence, and the way back.

Row by row, column by column, and both backwards (Liu et al., "VMamba: Visual State Space Model",
arXiv 2401.10166, section 4.2: the cross-scan module). The directions are the axis P of
`medlite.models.layers.scans.selective.selective_scan`: one call scans them all.

Letters: B batch, H W height and width, L = H W tokens, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_DIRECTIONS = 4


def cross_scan(maps: Tensor) -> Tensor:
    """Read each map in its direction.

    Args:
        maps: (B, 4, H, W, F) the features that each direction reads, or (B, 1, H, W, F) where
            all read the same.

    Returns:
        (B, 4, L, F) rows, columns, rows backwards, columns backwards.
    """
    row, column, row_back, column_back = maps.expand(-1, NUM_DIRECTIONS, -1, -1, -1).unbind(1)
    forwards = torch.stack([row.flatten(1, 2), column.transpose(1, 2).flatten(1, 2)], 1)
    backwards = [row_back.flatten(1, 2), column_back.transpose(1, 2).flatten(1, 2)]
    return torch.cat([forwards, torch.stack(backwards, 1).flip(2)], 1)


def cross_merge(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring what the directions say of each pixel back to its place, and add it up.

    Args:
        tokens: (B, 4, L, F) in the order of `cross_scan`.
        size: (H, W) of the map.

    Returns:
        (B, H, W, F).
    """
    height, width = size
    forwards, backwards = tokens.chunk(2, 1)
    rows, columns = (forwards + backwards.flip(2)).unbind(1)
    upright = columns.unflatten(1, (width, height)).transpose(1, 2)
    return rows.unflatten(1, (height, width)) + upright
