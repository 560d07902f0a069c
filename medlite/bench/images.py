"""Test images on disk, read one batch at a time so that they do not count as model memory.

Shapes in docstrings: N images, B batch, C channels, H W D height width depth.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np


class ImageFile:
    """The images of a .npy file, (N, C, H, W[, D]) float32, without holding them.

    A memory map would not do: the pages that it touched stay resident and would be measured.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, self._dtype = read(stream)
            self._offset = stream.tell()
        self._path = path
        self._num_images = int(shape[0])
        self.image_shape = tuple(int(side) for side in shape[1:])
        self.num_bytes_each = math.prod(self.image_shape) * self._dtype.itemsize

    def __len__(self) -> int:
        return self._num_images

    def batch(self, start: int, size: int) -> np.ndarray:
        """(B, C, H, W[, D]): `size` images from position `start` on, beginning again at the end."""
        batch = np.empty((size, *self.image_shape), dtype=self._dtype)
        with self._path.open("rb") as stream:
            for row in range(size):
                position = (start + row) % self._num_images
                stream.seek(self._offset + position * self.num_bytes_each)
                batch[row] = np.fromfile(stream, self._dtype, batch[row].size).reshape(
                    self.image_shape
                )
        return batch
