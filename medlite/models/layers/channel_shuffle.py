"""The channel shuffle, which lets groups of channels exchange what they hold."""

from __future__ import annotations

from torch import Tensor


def channel_shuffle(maps: Tensor, groups: int) -> Tensor:
    """Zhang et al., "ShuffleNet", arXiv 1707.01083, section 3.1: one channel of each group in turn.

    Written with reshapes, since ONNX has no such operator. Shuffling by C / groups undoes it.

    Args:
        maps: (B, C, ...).
        groups: divides C.
    """
    return maps.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
