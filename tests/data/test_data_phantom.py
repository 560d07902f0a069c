import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from medlite.data.image_data import SPLITS
from medlite.data.phantom import phantom
from medlite.errors import ConfigError

FORMS = [
    {"task": "segmentation", "labels": "binary", "num_classes": 1},
    {"task": "segmentation", "labels": "multiclass", "num_classes": 4},
    {"task": "classification", "labels": "binary", "num_classes": 1},
    {"task": "classification", "labels": "multiclass", "num_classes": 2},
    {"task": "classification", "labels": "multiclass", "num_classes": 4},
    {"task": "classification", "labels": "multilabel", "num_classes": 3},
]


@pytest.mark.parametrize("image_size", [(16, 12), (10, 12, 8)])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_samples_are_as_the_description_says(form, image_size):
    data = phantom(**form, image_size=image_size, in_channels=2)
    spec = data.spec
    num_names = 2 if form["labels"] == "binary" else form["num_classes"]
    assert len(spec.class_names) == len(spec.class_counts) == num_names
    for name in SPLITS:
        split = data.split(name)
        assert len(split.samples) == spec.num_samples[name]
        image, target = split.samples[0]
        assert image.shape == spec.input_shape
        assert image.dtype == np.float32
        if form["task"] == "segmentation":
            assert target.shape == image_size
            assert target.dtype == np.int64
        elif form["labels"] == "multilabel":
            assert target.shape == (form["num_classes"],)
            assert target.dtype == np.float32
        else:
            assert target.shape == ()
            assert target.dtype == np.int64


@pytest.mark.parametrize("form", FORMS[1:2] + FORMS[4:], ids=["masks", "classes", "labels"])
def test_the_last_class_is_rare_and_in_every_split(form):
    data = phantom(**form, num_train=80)
    assert data.spec.class_counts[-1] == min(data.spec.class_counts)
    for name in SPLITS:
        targets = data.split(name).samples.targets
        is_rare = targets[:, -1] if form["labels"] == "multilabel" else targets == targets.max()
        assert is_rare.any()
        assert targets.max() == (1 if form["labels"] == "multilabel" else form["num_classes"] - 1)


def test_class_counts_are_the_training_pixels():
    data = phantom()
    masks = data.train.samples.targets
    assert data.spec.class_counts == ((masks == 0).sum(), (masks == 1).sum())


def test_patients_have_several_images_and_one_split():
    data = phantom(images_per_patient=4, num_train=16, num_val=8, num_test=8)
    groups = [set(data.split(name).groups) for name in SPLITS]
    assert [len(ids) for ids in groups] == [4, 2, 2]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_images_of_a_patient_share_their_class():
    data = phantom(task="classification", labels="multiclass", num_classes=3, num_train=20)
    by_patient = {}
    for group, target in zip(data.train.groups, data.train.samples.targets, strict=True):
        by_patient.setdefault(group, set()).add(int(target))
    assert all(len(classes) == 1 for classes in by_patient.values())


def test_another_seed_makes_other_images():
    first, second = phantom(seed=1), phantom(seed=2)
    assert not np.array_equal(first.train.samples.images, second.train.samples.images)


def test_classes_can_be_told_by_their_extremes():
    data = phantom(
        task="classification", labels="multiclass", num_classes=3, num_train=60, num_test=40
    )

    def features(split):
        images = split.samples.images.reshape(len(split.groups), -1)
        return np.percentile(images, [1, 99], axis=1).T

    model = LogisticRegression(C=100).fit(features(data.train), data.train.samples.targets)
    assert model.score(features(data.test), data.test.samples.targets) > 0.95


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"task": "detection"}, "'detection' is not segmentation or classification"),
        ({"labels": "ordinal"}, "'ordinal' is not binary, multiclass or multilabel"),
        ({"labels": "multilabel", "num_classes": 3}, "segmentation is binary or multiclass"),
        ({"num_classes": 2}, "2 does not go with labels=binary"),
        ({"image_size": (4, 32)}, r"\[4, 32\] is not \(H, W\)"),
        ({"num_val": 0}, "images_per_patient: 0 is less than 1"),
    ],
)
def test_wrong_arguments_are_named(options, text):
    with pytest.raises(ConfigError, match=text):
        phantom(**options)
