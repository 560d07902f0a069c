import logging
from collections import Counter
from dataclasses import replace

import pytest

from medlite.data.image_data import SPLITS, ImageSplit
from medlite.data.phantom import phantom
from medlite.data.splits import (
    SplitRatios,
    complete_splits,
    find_leaks,
    split_by_group,
    warn_of_leaks,
)
from medlite.errors import ConfigError, DataError

RATIOS = SplitRatios(val=0.1, test=0.2)


def cohort(num_patients=100, images=3):
    """Patients with several images; every tenth is of the rare class."""
    groups = [f"p{patient}" for patient in range(num_patients) for _ in range(images)]
    labels = ["rare" if int(group[1:]) % 10 == 0 else "common" for group in groups]
    return groups, labels


def test_every_sample_is_in_one_split_with_all_of_its_group():
    groups, labels = cohort()
    positions = split_by_group(groups, labels, RATIOS, seed=0)
    assert sorted(p for name in SPLITS for p in positions[name]) == list(range(len(groups)))
    split_of = {groups[p]: set() for p in range(len(groups))}
    for name in SPLITS:
        for p in positions[name]:
            split_of[groups[p]].add(name)
    assert all(len(names) == 1 for names in split_of.values())


def test_each_label_has_its_share_of_groups_in_each_split():
    groups, labels = cohort(images=1)
    positions = split_by_group(groups, labels, RATIOS, seed=3)
    counts = {name: Counter(labels[p] for p in positions[name]) for name in SPLITS}
    assert counts["test"] == {"common": 18, "rare": 2}
    assert counts["val"] == {"common": 9, "rare": 1}


def test_split_depends_on_the_seed_alone():
    groups, labels = cohort()
    assert split_by_group(groups, labels, RATIOS, seed=1) == split_by_group(
        groups, labels, RATIOS, seed=1
    )
    assert split_by_group(groups, labels, RATIOS, seed=1) != split_by_group(
        groups, labels, RATIOS, seed=2
    )


@pytest.mark.parametrize(
    ("num_rare", "expected"),
    [
        (1, {"train": 1, "val": 0, "test": 0}),
        (2, {"train": 1, "val": 0, "test": 1}),
        (3, {"train": 1, "val": 1, "test": 1}),
    ],
)
def test_a_rare_class_goes_first_to_training_then_to_test(num_rare, expected):
    labels = ["rare"] * num_rare + ["common"] * 50
    positions = split_by_group([str(i) for i in range(len(labels))], labels, RATIOS, seed=0)
    assert {n: sum(labels[p] == "rare" for p in positions[n]) for n in SPLITS} == expected


def test_a_class_that_cannot_be_tested_is_named(caplog):
    labels = ["basophil"] + ["neutrophil"] * 50
    groups = [str(i) for i in range(51)]
    with caplog.at_level(logging.WARNING):
        complete_splits([None] * 51, groups, labels, RATIOS, seed=0)
    assert caplog.messages == [
        f"class 'basophil' has no images in the {split} split" for split in ("val", "test")
    ]


def test_given_splits_are_kept():
    given = ["train", "val", "test", "train"]
    positions = complete_splits(given, list("abcd"), ["x"] * 4, RATIOS, seed=0)
    assert positions == {"train": [0, 3], "val": [1], "test": [2]}


def test_missing_validation_is_taken_from_training():
    given = ["train"] * 80 + ["test"] * 20
    groups = [str(i // 2) for i in range(100)]
    positions = complete_splits(given, groups, ["x"] * 100, RATIOS, seed=0)
    assert positions["test"] == list(range(80, 100))
    assert len(positions["val"]) == 10
    assert sorted(positions["train"] + positions["val"]) == list(range(80))


@pytest.mark.parametrize(
    ("given", "groups", "text"),
    [
        (["train", None, "test"], "abc", "1 of 3 images have no split"),
        (["train", "val", "val"], "abc", "3 images of 3 groups leave nothing for test"),
        (["train", "val", "test"], "aba", r"several splits: a \(train, test\)"),
        ([None, None], "ab", "leave nothing for val"),
    ],
)
def test_splits_that_cannot_be_used_are_refused(given, groups, text):
    with pytest.raises(DataError, match=text):
        complete_splits(given, list(groups), ["x"] * len(given), RATIOS, seed=0)


def test_ratios_must_leave_training_data():
    with pytest.raises(ConfigError, match=r"0.5 and 0.5 are not positive with a sum below 1"):
        SplitRatios(0.5, 0.5)


def leaky():
    """Test image 0 is training image 3, and training patient 0 is also a test patient."""
    data = phantom(num_train=6, num_val=4, num_test=4, images_per_patient=1)
    images = data.test.samples.images.copy()
    images[0] = data.train.samples.images[3]
    groups = ("train-0000", *data.test.groups[1:])
    return replace(data, test=ImageSplit(replace(data.test.samples, images=images), groups))


def test_leaks_are_counted_for_each_pair_of_splits():
    leaks = find_leaks(leaky())
    nothing = {("train", "val"): 0, ("val", "test"): 0}
    assert leaks.num_groups == {("train", "test"): 1, **nothing}
    assert leaks.num_images == {("train", "test"): 1, **nothing}


def test_leaks_are_logged_and_clean_data_is_not(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_leaks(phantom(num_train=6, num_val=4, num_test=4))
        assert not caplog.messages
        warn_of_leaks(leaky())
    assert caplog.messages == [
        "dataset phantom: 1 group(s) in both train and test; "
        "1 exactly equal image(s) in both train and test"
    ]
