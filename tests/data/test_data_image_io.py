import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from medlite.data.image_io import UNREADABLE, prepare_image, prepare_mask, read_image, read_mask

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
DEEP = GREY.astype(np.uint16) * 257
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], -1)


def prepared(image, size=(6, 8), channels=1, limits=None):
    return prepare_image(image, image_size=size, in_channels=channels, intensity_range=limits)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("array", [GREY, DEEP, COLOUR], ids=["grey", "16 bit", "colour"])
def test_lossless_files_are_read_as_stored(tmp_path, array, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(array).save(path)
    np.testing.assert_array_equal(read_image(path), array)
    assert read_image(path).dtype == array.dtype


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
def test_compressed_tiffs_are_read(tmp_path, compression):
    Image.fromarray(DEEP).save(tmp_path / "image.tiff", compression=compression)
    np.testing.assert_array_equal(read_image(tmp_path / "image.tiff"), DEEP)


def test_tiffs_with_16_bit_colours_keep_their_depth(tmp_path):
    deep_colour = COLOUR.astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "image.tif", deep_colour, photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "image.tif"), deep_colour)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}])
@pytest.mark.parametrize("num_planes", [3, 4])
def test_tiffs_with_16_bit_colours_in_planes_keep_them(tmp_path, options, num_planes):
    planes = np.stack([DEEP, DEEP[::-1], 65535 - DEEP, DEEP])[:num_planes]
    tifffile.imwrite(
        tmp_path / "image.tif", planes, photometric="rgb", planarconfig="separate", **options
    )
    np.testing.assert_array_equal(
        read_image(tmp_path / "image.tif"), np.moveaxis(planes[:3], 0, -1)
    )


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint32])
def test_tiffs_of_other_integers_keep_their_values_and_type(tmp_path, dtype):
    limits = np.iinfo(dtype)
    values = np.linspace(limits.min, limits.max, 48).reshape(6, 8).astype(dtype)
    tifffile.imwrite(tmp_path / "image.tif", values)
    np.testing.assert_array_equal(read_image(tmp_path / "image.tif"), values)
    assert read_image(tmp_path / "image.tif").dtype == dtype


def test_deep_tiffs_with_0_for_white_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "image.tif", DEEP, photometric="miniswhite")
    with pytest.raises(ValueError, match="16 bits with 0 for white; save it with 0 for black"):
        read_image(tmp_path / "image.tif")
    tifffile.imwrite(tmp_path / "image.tif", GREY, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "image.tif"), 255 - GREY)


def test_pngs_with_16_bit_colours_are_refused(tmp_path):
    path = tmp_path / "image.png"
    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
    )
    with pytest.raises(ValueError, match="16 bits for each colour"):
        read_image(path)


def test_jpegs_are_read_nearly_as_stored(tmp_path):
    smooth = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "image.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "image.jpg").astype(int) - smooth).max() < 8


def test_transparency_and_palettes_become_colours(tmp_path):
    opaque = np.dstack([COLOUR, np.full(GREY.shape, 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), COLOUR)
    palette = Image.fromarray(GREY // 64, mode=None).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == (6, 8, 3)
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png"), GREY // 64)


def test_several_pages_are_refused(tmp_path):
    tifffile.imwrite(
        tmp_path / "stack.tif", np.zeros((3, 8, 8), np.uint8), photometric="minisblack"
    )
    with pytest.raises(ValueError, match="it holds 3 pages, one is expected"):
        read_image(tmp_path / "stack.tif")


def test_a_mask_in_colours_is_refused(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="one channel of class values"):
        read_mask(tmp_path / "mask.png")


def test_a_grey_mask_stored_in_three_channels_is_read(tmp_path):
    Image.fromarray(np.dstack([GREY] * 3)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), GREY)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.9])
def test_truncated_files_raise_what_the_check_expects(tmp_path, suffix, keep):
    path = tmp_path / f"image.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UNREADABLE):
        read_image(path)


def test_the_whole_range_of_the_type_becomes_minus_one_to_one():
    for dtype in (np.uint8, np.uint16):
        top = np.iinfo(dtype).max
        ends = prepared(np.array([[0, top]], dtype), size=(1, 2))
        np.testing.assert_allclose(ends, [[[-1, 1]]], atol=1e-6)


def test_a_given_range_is_stretched_and_clipped():
    twelve_bit = np.array([[0, 2048, 4095, 5000]], np.uint16)
    result = prepared(twelve_bit, size=(1, 4), limits=(0, 4095))
    np.testing.assert_allclose(result, [[[-1, 0, 1, 1]]], atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.int16, np.int32, np.uint32])
def test_values_of_other_types_need_a_range(dtype):
    image = np.zeros((4, 4), dtype)
    with pytest.raises(ValueError, match=r"set dataset.intensity_range=\[low,high\]"):
        prepared(image)
    assert prepared(image, size=(4, 4), limits=(-1, 1)).max() == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value):
    image = np.zeros((4, 4), np.float32)
    image[1, 2] = value
    with pytest.raises(ValueError, match="1 of its values are NaN or infinite"):
        prepared(image, limits=(-1, 1))


def test_grey_is_repeated_and_colours_are_weighed():
    assert np.ptp(prepared(GREY, channels=3), axis=0).max() == 0
    grey = prepared(COLOUR, channels=1)[0]
    expected = COLOUR / 127.5 - 1
    expected = expected @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(grey, expected, atol=1e-5)


def test_shrinking_averages_instead_of_skipping():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(prepared(board, size=(8, 8))).max() < 0.02


def test_colour_channels_stay_in_place_when_resized():
    image = np.zeros((10, 10, 3), np.uint8)
    image[..., 1] = 255
    np.testing.assert_allclose(prepared(image, (5, 7), 3).mean((1, 2)), [-1, 1, -1], atol=1e-6)


def test_masks_keep_their_classes_when_resized():
    mask = np.repeat(np.array([[0, 128, 255]], np.uint8), 9, axis=0).repeat(5, axis=1)
    small = prepare_mask(mask, image_size=(3, 6), class_of_value={0: 0, 128: 1, 255: 2})
    np.testing.assert_array_equal(small, [[0, 0, 1, 1, 2, 2]] * 3)
    assert small.dtype == np.int64


def test_values_without_a_class_are_listed():
    mask = np.array([[0, 7, 9]], np.uint8)
    with pytest.raises(ValueError, match=r"values 7, 9 have no class; .*maps 0, 1"):
        prepare_mask(mask, image_size=(1, 3), class_of_value={0: 0, 1: 1})
