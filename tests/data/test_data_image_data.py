from dataclasses import replace

import numpy as np
import pytest

from medlite.data.image_data import ArraySamples, ImageSplit
from medlite.data.phantom import phantom


def small(**options):
    return phantom(**{"num_train": 6, "num_val": 4, "num_test": 4, **options})


def test_split_assignment_names_each_group_once():
    data = small(images_per_patient=2)
    assignment = data.split_assignment()
    assert assignment["train"] == ["train-0000", "train-0001", "train-0002"]
    assert {name: len(groups) for name, groups in assignment.items()} == data.spec.num_groups


def test_fingerprint_is_the_same_for_the_same_data():
    assert small().fingerprint == small().fingerprint


def with_images(data, images):
    samples = replace(data.train.samples, images=images)
    return replace(data, train=ImageSplit(samples, data.train.groups))


def with_targets(data, targets):
    samples = replace(data.train.samples, targets=targets)
    return replace(data, train=ImageSplit(samples, data.train.groups))


def changed_in_one_place(array):
    changed = array.copy()
    changed.flat[-1] += 1
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda data: with_images(data, changed_in_one_place(data.train.samples.images)),
        lambda data: with_targets(data, changed_in_one_place(data.train.samples.targets)),
        lambda data: replace(data, spec=replace(data.spec, preprocessing="another")),
        lambda data: replace(data, val=data.test, test=data.val),
        lambda data: replace(
            data, train=ImageSplit(data.train.samples, ("other", *data.train.groups[1:]))
        ),
    ],
    ids=["pixel", "target", "description", "splits", "groups"],
)
def test_fingerprint_changes_with(change):
    data = small()
    assert change(data).fingerprint != data.fingerprint


def test_array_samples_scale_on_reading():
    samples = ArraySamples(np.full((1, 1, 2, 2), 255, np.uint8), np.zeros(1, np.uint8), 2 / 255, -1)
    image, target = samples[0]
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, 1, atol=1e-6)
    assert target.dtype == np.int64


def test_equal_images_have_equal_digests():
    images = np.zeros((3, 1, 4, 4), np.uint8)
    images[2] = 1
    first, second, third = ArraySamples(images, np.zeros(3)).image_digests()
    assert first == second != third
