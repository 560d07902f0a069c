import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from medlite.data.augmentation import RECIPES
from medlite.safety.corruptions import CORRUPTIONS, SEVERITIES, SUITES, corrupt, suite_of

SHAPES = ((1, 28, 28), (3, 32, 24), (2, 16, 16), (1, 20, 16, 12))
STRUCTURED = {"motion", "ghosting", "gibbs"}


def make_image(shape, seed=0):
    """Smooth blobs in [-1, 1], as preprocessing leaves an image."""
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = gaussian_filter(noise, (0, 2, 2, 1)[: len(shape)])
    return (2 * (smooth - smooth.min()) / np.ptp(smooth) - 1).astype(np.float32)


def apply(image, name, severity, *, position=3, target=None):
    target = np.array(1) if target is None else target
    return corrupt(
        image, target, name=name, severity=severity, position=position, value_range=(-1, 1)
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_keeps_shape_type_and_value_range(name, shape):
    image = make_image(shape)
    for severity in SEVERITIES:
        changed, target = apply(image, name, severity)
        assert (changed.shape, changed.dtype, type(changed)) == (shape, np.float32, np.ndarray)
        assert changed.flags.c_contiguous
        assert changed.min() >= -1
        assert changed.max() <= 1
        assert not np.array_equal(changed, image)
        assert target == 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_0_is_the_image_itself(name):
    image = make_image((1, 28, 28))
    assert np.array_equal(apply(image, name, 0)[0], image)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_whoever_asks_sees_the_same_bits(name):
    image = make_image((3, 28, 28))
    np.random.seed(0)  # what a library left behind must not matter
    first = apply(image, name, 3)[0]
    np.random.seed(7)
    assert np.array_equal(first, apply(image, name, 3)[0])


@pytest.mark.parametrize("name", ["gaussian_noise", "rician_noise", "speckle", "bias_field"])
def test_samples_and_severities_meet_different_chance(name):
    image = np.zeros((1, 28, 28), np.float32)
    other_sample = apply(image, name, 3, position=4)[0]
    assert not np.array_equal(apply(image, name, 3)[0], other_sample)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severities_grow(name):
    images = [make_image((1, 48, 48), seed) for seed in range(12)]
    changes = [
        np.mean([np.abs(apply(i, name, s, position=p)[0] - i).mean() for p, i in enumerate(images)])
        for s in SEVERITIES
    ]
    assert changes == sorted(changes)


def test_every_modality_that_is_augmented_has_a_suite_of_known_corruptions():
    assert len(SUITES) >= 12
    assert SUITES.keys() == RECIPES.keys()
    for names in SUITES.values():
        assert set(names) <= CORRUPTIONS.keys()
        assert {"resolution", "spacing"} <= set(names)
    assert {"motion", "ghosting", "bias_field"} <= set(suite_of("mr"))
    assert not STRUCTURED & set(suite_of("ct"))
    assert suite_of("never heard of") == SUITES["other"]


def test_a_mask_moves_with_its_pixels_under_another_spacing_alone():
    mask = np.zeros((40, 40), np.int64)
    mask[12:28, 12:28] = 2
    image = (2 * (mask > 0) - 1)[None].astype(np.float32)
    for position in range(4):
        changed, moved = apply(image, "spacing", 5, position=position, target=mask)
        assert set(np.unique(moved)) == {0, 2}
        assert moved.dtype == np.int64
        assert ((changed[0] > 0) != (moved > 0)).mean() < 0.05
        assert abs((moved > 0).sum() - 256) > 60
        assert np.array_equal(apply(image, "blur", 5, target=mask)[1], mask)


def test_noise_has_the_spread_of_its_table():
    image = np.zeros((1, 200, 200), np.float32)
    changed = apply(image, "gaussian_noise", 3)[0]
    assert changed.std() == pytest.approx(2 * 0.08, rel=0.02)


def test_blur_is_the_gaussian_of_its_table():
    image = make_image((1, 64, 64))
    expected = gaussian_filter(image[0], 0.02 * 64, mode="nearest")
    difference = np.abs(apply(image, "blur", 3)[0][0] - expected)
    assert difference.max() < 0.02  # MONAI integrates the kernel over each pixel, scipy samples it


def test_contrast_keeps_the_mean_and_shrinks_the_spread():
    image = make_image((1, 40, 40))
    changed = apply(image, "contrast", 2)[0]
    assert changed.mean() == pytest.approx(image.mean(), abs=1e-5)
    assert changed.std() == pytest.approx(0.7 * image.std(), rel=1e-3)


def test_an_intensity_shift_goes_either_way():
    image = np.zeros((1, 8, 8), np.float32)
    shifts = {round(float(apply(image, "intensity_shift", 2, position=p)[0].mean()), 4)
              for p in range(20)}  # fmt: skip
    assert shifts == {0.16, -0.16}


def test_jpeg_is_what_the_file_holds():
    image = make_image((3, 32, 32))
    pixels = ((image + 1) / 2 * 255).round().astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=25)
    expected = np.asarray(Image.open(buffer)).transpose(2, 0, 1) / 255 * 2 - 1
    assert np.allclose(apply(image, "jpeg", 3)[0], expected, atol=1e-5)


def test_motion_and_ghosts_leave_the_contrast_and_work_along_rows():
    image = np.full((1, 32, 32), -1, np.float32)
    image[0, 14:18, 8:24] = 1
    for name in ("motion", "ghosting"):
        changed = apply(image, name, 4)[0]
        outside = np.abs(changed + 1)[0]
        assert outside[:10].max() > 0.02, name
    ghosts = apply(image, "ghosting", 4)[0]
    assert np.abs(ghosts[0, :, :6] + 1).max() < 1e-4
