"""Which folders are samples, classes and splits."""

import logging

import pytest
from toy_folders import classes_of, load, segmentation, write_classes, write_image, write_pairs

from medlite.errors import DataError


def test_sub_folders_are_classes(tmp_path):
    write_classes(tmp_path, ill=20, well=30)
    data = load(tmp_path)
    assert data.spec.class_names == ("ill", "well")
    assert data.spec.labels == "multiclass"
    assert data.spec.num_classes == 2
    assert data.spec.class_counts == (14, 21)
    assert data.spec.num_samples == {"train": 35, "val": 5, "test": 10}
    assert data.spec.group_kind == "image"
    assert all(path.startswith(name) for path, name in classes_of(data).items())


def test_split_folders_are_kept(tmp_path):
    for split, num in (("train", 6), ("val", 2), ("test", 4)):
        for i, name in enumerate(("a", "b")):
            for j in range(num):
                write_image(tmp_path / split / name / f"{j}.jpg", seed=100 * i + j + num * 1000)
    data = load(tmp_path)
    assert data.spec.num_samples == {"train": 12, "val": 4, "test": 8}
    assert all(group.startswith("test/") for group in data.test.groups)


@pytest.mark.parametrize(
    "folders",
    [("Training", "valid", "Testing"), ("Train", "Validation", "TEST")],
)
def test_split_folders_may_have_other_names(tmp_path, folders):
    for seed, (split, num) in enumerate(zip(folders, (6, 2, 4), strict=True)):
        for name in ("a", "b"):
            for j in range(num):
                write_image(tmp_path / split / name / f"{j}.png", seed=[seed, ord(name), j])
    data = load(tmp_path)
    assert data.spec.class_names == ("a", "b")
    assert data.spec.num_samples == {"train": 12, "val": 4, "test": 8}
    assert all(group.startswith(folders[1]) for group in data.val.groups)


def test_split_folders_may_lie_in_the_classes(tmp_path):
    for split, num in (("train", 6), ("val", 2), ("test", 4)):
        for name in ("a", "b"):
            for j in range(num):
                write_image(tmp_path / name / split / f"{j}.png", seed=[num, ord(name), j])
    data = load(tmp_path)
    assert data.spec.class_names == ("a", "b")
    assert data.spec.num_samples == {"train": 12, "val": 4, "test": 8}
    assert {group.split("/")[1] for group in data.test.groups} == {"test"}
    write_image(tmp_path / "b" / "stray.png", seed=0)
    with pytest.raises(DataError, match=r"b/stray.png: lies beside the folders of the splits"):
        load(tmp_path)


def test_test_folders_in_the_classes_are_kept_without_train_folders(tmp_path):
    for split, num in (("val", 3), ("test", 4)):
        for name in ("a", "b"):
            for j in range(num):
                write_image(tmp_path / name / split / f"{j}.png", seed=[num, ord(name), j])
    with pytest.raises(DataError, match="train"):
        load(tmp_path)


def test_below_splits_and_classes_folders_may_have_any_name(tmp_path):
    for split, num in (("train", 6), ("val", 2), ("test", 4)):
        for name in ("a", "b"):
            for j in range(num):
                place = tmp_path / split / name / ("train" if j else "")
                write_image(place / f"{j}.png", seed=[num, ord(name), j])
    assert load(tmp_path).spec.num_samples == {"train": 12, "val": 4, "test": 8}


def test_images_in_no_class_are_told(tmp_path, caplog):
    write_classes(tmp_path, ill=20, well=30)
    write_image(tmp_path / "overview.png", seed=999)
    with caplog.at_level(logging.WARNING):
        assert sum(load(tmp_path).spec.num_samples.values()) == 50
    assert "1 image(s) below" in caplog.text
    assert "lie in no class and are not used" in caplog.text


def test_masks_may_lie_in_split_folders_of_other_names(tmp_path):
    for split in ("Training", "valid", "Testing"):
        write_pairs(tmp_path / split, num=2)
    assert segmentation(tmp_path).spec.num_samples == {"train": 2, "val": 2, "test": 2}


@pytest.mark.parametrize("names", [("Testing", "valid"), ("ill", "well", "test")])
def test_split_folders_are_never_classes(tmp_path, names):
    write_classes(tmp_path, **dict.fromkeys(names, 12))
    with pytest.raises(DataError, match="some are named like splits, not classes; put the classes"):
        load(tmp_path)


@pytest.mark.parametrize("folder", ["", "train"])
def test_images_and_masks_are_never_classes(tmp_path, folder):
    write_pairs(tmp_path / folder)
    with pytest.raises(DataError, match=r"images and masks, .* set dataset.task=segmentation"):
        load(tmp_path)


def test_hidden_files_and_folders_are_no_samples(tmp_path):
    write_classes(tmp_path, a=12, b=12)
    write_image(tmp_path / "a" / ".checkpoints" / "1.png")
    write_image(tmp_path / "a" / "._2.png")
    write_image(tmp_path / ".thumbnails" / "1.png")
    assert sum(load(tmp_path).spec.num_samples.values()) == 24


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(DataError, match=r"dataset.root: .*nowhere is not a folder"):
        load(tmp_path / "nowhere")


def test_missing_mask_folder_is_named(tmp_path):
    write_image(tmp_path / "images" / "1.png")
    with pytest.raises(DataError, match=r"masks does not exist; segmentation needs"):
        segmentation(tmp_path)


def test_two_images_for_one_mask_are_refused(tmp_path):
    write_pairs(tmp_path, num=3)
    write_image(tmp_path / "images" / "001.jpg")
    with pytest.raises(DataError, match="differ in their suffix alone"):
        segmentation(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="0 images of 0 groups leave nothing"):
        segmentation(tmp_path)


def write_others(root, names, suffix, num=2):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(num):
            (root / name / f"{i}{suffix}").write_bytes(b"")


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".dcm", "4 .dcm"),
        (".NII.gz", "4 .nii.gz"),
        (".bmp", "4 .bmp"),
        (".Smith_John", "4 without a suffix"),
    ],
)
def test_files_that_are_no_images_are_named_where_there_are_no_classes(tmp_path, suffix, text):
    write_others(tmp_path, ("a", "b"), suffix)
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert "found: none\n  4 other file(s) are left out (" + text + "); images are" in str(
        caught.value
    )


def test_files_that_are_no_images_are_named_where_there_are_no_masks(tmp_path):
    write_others(tmp_path, ("images", "masks"), ".dcm")
    with pytest.raises(DataError, match=r"no images\n  4 other file.*\(4 .dcm\); images are .jpeg"):
        segmentation(tmp_path)


def test_files_that_are_no_images_are_counted_beside_images(tmp_path, caplog):
    write_classes(tmp_path, a=12, b=12)
    write_others(tmp_path, ("a", "b"), ".bmp", num=6)
    write_others(tmp_path, ("a",), ".txt")
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert (
        "12 other file(s) are left out (12 .bmp); images are .jpeg, .jpg, .png, .tif or .tiff"
        in caplog.messages
    )


def test_notes_beside_images_are_not_warned_of(tmp_path, caplog):
    write_classes(tmp_path, a=12, b=12)
    write_others(tmp_path, ("a", "b"), ".json")
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert "other file" not in caplog.text
