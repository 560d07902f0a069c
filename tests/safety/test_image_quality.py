import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medlite.safety.image_quality import QUALITIES, measure_quality


def smooth(side=64):
    rows, columns = np.indices((side, side)) / side
    return (np.sin(6 * rows) * np.cos(5 * columns))[None]


def test_brightness_and_contrast_are_mean_and_standard_deviation():
    image = np.random.default_rng(0).normal(3, 2, (1, 40, 40))
    found = measure_quality([image, image + 1, 2 * image])
    assert found["brightness"] == pytest.approx([image.mean(), image.mean() + 1, 2 * image.mean()])
    assert found["contrast"] == pytest.approx(image.std() * np.array([1, 1, 2]))


@pytest.mark.parametrize("sd", [0.05, 0.2])
def test_the_noise_that_was_added_is_found(sd):
    noise = np.random.default_rng(0).normal(0, sd, (1, 64, 64))
    clean, noisy = measure_quality([smooth(), smooth() + noise])["noise"]
    assert clean < 0.01
    assert noisy == pytest.approx(sd, rel=0.05)


def test_a_blurred_image_is_less_sharp_and_contrast_does_not_count():
    image = np.random.default_rng(0).random((1, 64, 64))
    blurred = gaussian_filter(image, (0, 2, 2))
    sharp, soft, strong = measure_quality([image, blurred, 3 * image])["sharpness"]
    assert soft < sharp / 10
    assert strong == pytest.approx(sharp)


def test_channels_are_averaged_and_slices_of_a_volume_too():
    image = np.random.default_rng(0).random((3, 32, 32))
    flat = measure_quality([image.mean(0, keepdims=True)])
    volume = np.repeat(image[..., None], 4, axis=-1)
    for found in (measure_quality([image]), measure_quality([volume])):
        for quality in QUALITIES:
            assert found[quality] == pytest.approx(flat[quality])


def test_an_even_image_has_no_sharpness():
    found = measure_quality([np.full((1, 8, 8), 2.0)])
    assert (found["sharpness"], found["noise"], found["contrast"]) == (0, 0, 0)
