"""PNG, JPEG and TIFF files to arrays of one size and range."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})

UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""what the libraries raise for files that are corrupt, truncated or of another kind"""

_COLOUR_MODES = {"P": "RGB", "RGBA": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LA": "L", "1": "L"}
_BITS_TAG, _PHOTOMETRIC_TAG, _PLANES_TAG, _FORMAT_TAG = 258, 262, 284, 339  # TIFF 6.0
_WHITE_IS_ZERO, _SEPARATE, _LETTERS = 0, 2, {1: "u", 2: "i"}  # their values
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def read_image(path: Path) -> np.ndarray:
    """(H, W) or (H, W, 3) as stored, integers or float; transparency is dropped.

    Raises:
        ValueError: not one grey or RGB image.
        OSError: and others of `UNREADABLE`, when the file is damaged.
    """
    array = _read_with_pillow(path, _COLOUR_MODES)
    if array.ndim != 2 and array.shape[2:] != (3,):
        message = f"its shape {array.shape} is neither (H, W) nor (H, W, 3)"
        raise ValueError(message)
    return array


def read_mask(path: Path) -> np.ndarray:
    """(H, W) class values as stored; of a palette image the indices, not the colours.

    Raises:
        ValueError: the channels differ, so that a pixel has no one value.
        OSError: and others of `UNREADABLE`, when the file is damaged.
    """
    array = _read_with_pillow(path, {"RGBA": "RGB", "LA": "L", "1": "L"})
    if array.ndim == 2:
        return array
    if (array != array[..., :1]).any():
        message = "a mask needs one channel of class values, this one has colours"
        raise ValueError(message)
    return array[..., 0]


def _read_with_pillow(path: Path, modes: Mapping[str, str]) -> np.ndarray:
    with Image.open(path) as file:
        num_pages = file.n_frames if isinstance(file, TiffImageFile) else 1
        if num_pages > 1:
            message = f"it holds {num_pages} pages, one is expected"
            raise ValueError(message)
        if isinstance(file, TiffImageFile):
            return _read_tiff(path, file, modes)
        if file.mode.startswith("RGB") and ";16" in str(file.tile):
            message = (
                "it has 16 bits for each colour, which only TIFF files may have; save it as TIFF"
            )
            raise ValueError(message)
        return _as_array(file, modes)


def _as_array(file: Image.Image, modes: Mapping[str, str]) -> np.ndarray:
    return np.asarray(file.convert(modes[file.mode]) if file.mode in modes else file)


def _read_tiff(path: Path, file: TiffImageFile, modes: Mapping[str, str]) -> np.ndarray:
    """The values and the type that the file's tags tell, where Pillow passes over them."""
    num_bits = max(file.tag_v2.get(_BITS_TAG, (1,)))
    if num_bits > 8 and file.tag_v2.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
        message = f"it has {num_bits} bits with 0 for white; save it with 0 for black"
        raise ValueError(message)
    if num_bits > 8 and file.mode.startswith("RGB"):
        return _read_deep_colours(path, file.tag_v2.get(_PLANES_TAG) == _SEPARATE)
    array = _as_array(file, modes)
    letter = _LETTERS.get(file.tag_v2.get(_FORMAT_TAG, (1,))[0])
    if file.mode in ("L", "I") and letter and num_bits in (8, 16, 32):
        return array.astype(f"{letter}{num_bits // 8}")
    return array


def _read_deep_colours(path: Path, has_planes: bool) -> np.ndarray:
    """(H, W, 3) uint16, of which Pillow would keep the upper 8 bits."""
    colours = tifffile.imread(path)
    return (np.moveaxis(colours, 0, -1) if has_planes else colours)[..., :3]


def value_range(dtype: np.dtype) -> tuple[float, float]:
    """What becomes [-1, 1] by default: the whole range of an unsigned type of 8 or 16 bits.

    Raises:
        ValueError: other types hold units such as HU, far from filling the type's range.
    """
    if dtype.kind != "u" or dtype.itemsize > 2:
        message = f"{dtype} values have no natural range; set dataset.intensity_range=[low,high]"
        raise ValueError(message)
    return 0.0, float(np.iinfo(dtype).max)


def prepare_image(
    image: np.ndarray,
    *,
    image_size: Sequence[int],
    in_channels: int,
    intensity_range: Sequence[float] | None,
) -> np.ndarray:
    """(C, H, W) float32 in [-1, 1] from (H, W) or (H, W, 3).

    Colours become grey by luminance and grey is repeated, as `in_channels` asks. Resizing is
    bilinear over the whole area that an output pixel covers, so that shrinking does not alias.

    Raises:
        ValueError: values without a range, or that are not finite.
    """
    if not np.isfinite(image).all():
        message = f"{np.sum(~np.isfinite(image))} of its values are NaN or infinite"
        raise ValueError(message)
    low, high = intensity_range or value_range(image.dtype)
    scaled = np.clip((image.astype(np.float32) - low) / (high - low), 0, 1) * 2 - 1
    if scaled.ndim == 3 and in_channels == 1:
        scaled = scaled @ _LUMINANCE
    channels = np.moveaxis(scaled, -1, 0) if scaled.ndim == 3 else scaled[None]
    height, width = image_size
    if channels.shape[1:] != (height, width):
        resized = [
            Image.fromarray(np.ascontiguousarray(channel)).resize(
                (width, height), Image.Resampling.BILINEAR
            )
            for channel in channels
        ]
        channels = np.stack([np.asarray(channel) for channel in resized])
    return np.repeat(channels, in_channels // len(channels), axis=0)


def prepare_mask(
    mask: np.ndarray, *, image_size: Sequence[int], class_of_value: Mapping[int, int]
) -> np.ndarray:
    """(H, W) int64 class indices; resizing takes the nearest pixel.

    Raises:
        ValueError: a value without a class.
    """
    values, inverse = np.unique(mask, return_inverse=True)
    unmapped = [value.item() for value in values if value.item() not in class_of_value]
    if unmapped:
        message = (
            f"its values {_shortened(unmapped)} have no class; dataset.mask_classes maps "
            f"{_shortened(list(class_of_value))}"
        )
        raise ValueError(message)
    classes = np.array([class_of_value[value.item()] for value in values])[inverse]
    height, width = image_size
    rows = ((np.arange(height) + 0.5) * mask.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * mask.shape[1] / width).astype(int)
    return classes.reshape(mask.shape)[np.ix_(rows, columns)]


def _shortened(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
