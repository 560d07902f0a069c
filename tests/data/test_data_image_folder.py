import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from toy_folders import (
    classes_of,
    csv_of,
    load,
    segmentation,
    write_classes,
    write_image,
    write_mask,
    write_pairs,
)

from medlite.command_line import conf_directory
from medlite.config import build
from medlite.data import folder_check
from medlite.data.augmentation import RECIPES
from medlite.data.image_data import SPLITS
from medlite.data.module import ImageDataModule
from medlite.errors import ConfigError, DataError

needs_data = pytest.mark.skipif(
    "MEDLITE_DATA" not in os.environ, reason="MEDLITE_DATA names no folder of real data"
)


def test_without_sources_there_are_none(tmp_path):
    write_classes(tmp_path, ill=20, well=20)
    assert load(tmp_path).test.sources is None


def test_class_names_rename_merge_and_order(tmp_path):
    write_classes(tmp_path, a=12, b=12, c=12)
    data = load(tmp_path, class_names={"c": "ill", "a": "well", "b": "ill"})
    assert data.spec.class_names == ("ill", "well")
    assert set(classes_of(data).items()) >= {("a/000.png", "well"), ("b/000.png", "ill")}


def test_a_named_class_without_an_image_is_told(tmp_path, caplog):
    write_classes(tmp_path, a=12, b=12)
    with caplog.at_level(logging.WARNING):
        load(tmp_path, class_names={"a": "ill", "b": "well", "c": "unsure"})
    assert "class 'unsure' of dataset.class_names has no image" in caplog.messages
    assert "'well'" not in caplog.text


def test_names_can_be_given_on_the_command_line_as_the_error_says(tmp_path):
    write_classes(tmp_path, **{"0": 12, "1": 12})
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, class_names=["benign", "malignant"])
    (word,) = re.findall(r"write '(.*)'$", str(caught.value))
    words = ["dataset=image_folder", f"dataset.root={tmp_path}", "dataset.image_size=8", word]
    OmegaConf.register_new_resolver("run_name", lambda: "test", replace=True)
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        data = build(compose("config", words).dataset)
    assert data.spec.class_names == ("benign", "malignant")


def test_the_yaml_names_every_modality():
    yaml = (conf_directory() / "dataset" / "image_folder.yaml").read_text()
    (line,) = re.findall(r"^modality: (.*)$", yaml, re.MULTILINE)
    assert {"phantom", *re.findall(r"\w+", line)} == set(RECIPES)


def test_numbers_as_labels_are_sorted_by_size(tmp_path):
    write_classes(tmp_path, **{"10": 5, "9": 5, "1": 5})
    assert load(tmp_path).spec.class_names == ("1", "9", "10")


def test_a_label_without_a_name_is_bad(tmp_path):
    write_classes(tmp_path, a=12, b=12, c=1)
    with pytest.raises(DataError, match=r"c/000.png: its label 'c' is not in dataset.class_names"):
        load(tmp_path, class_names={"a": "ill", "b": "well"})


def test_one_class_is_not_enough(tmp_path):
    write_classes(tmp_path, a=12)
    with pytest.raises(DataError, match="two classes and more, found: a"):
        load(tmp_path)


def test_a_class_with_one_image_is_trained_on_and_named(tmp_path, caplog):
    write_classes(tmp_path, common=30, rare=1)
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path)
    assert data.spec.class_counts[1] == 1
    assert "class 'rare' has no images in the test split" in caplog.messages


def test_a_number_alone_is_the_side_of_a_square(tmp_path):
    write_classes(tmp_path, a=12, b=12)
    assert load(tmp_path, image_size=9).spec.image_size == (9, 9)


def test_masks_with_two_classes_are_binary(tmp_path):
    write_pairs(tmp_path)
    data = segmentation(tmp_path, image_size=(12, 10))
    assert (data.spec.labels, data.spec.num_classes) == ("binary", 1)
    assert data.spec.class_names == ("background", "foreground")
    num_train = data.spec.num_samples["train"]
    assert data.spec.class_counts == (num_train * (120 - 36), num_train * 36)
    image, mask = data.train.samples[0]
    assert image.shape == (1, 12, 10)
    assert mask.dtype == np.int64
    assert mask.sum() == 36


def test_mask_classes_name_values_in_order(tmp_path):
    write_pairs(tmp_path, value=7)
    names = {0: "background", 3: "cytoplasm", 7: "nucleus"}
    data = segmentation(tmp_path, mask_classes=names)
    assert (data.spec.labels, data.spec.num_classes) == ("multiclass", 3)
    assert data.spec.class_names == tuple(names.values())
    assert set(np.unique(data.train.samples.targets)) == {0, 2}


def test_a_csv_adds_patients_to_masks(tmp_path):
    write_pairs(tmp_path, num=20)
    csv = csv_of(tmp_path, "path,group", [f"{i:03d},p{i // 2}" for i in range(20)])
    data = segmentation(tmp_path, csv=csv)
    assert sum(data.spec.num_groups.values()) == 10
    assert data.spec.group_kind == "patient"


def test_a_csv_names_images_of_split_folders_by_their_path(tmp_path):
    rows = []
    for split in SPLITS:
        for i in range(2):
            write_image(tmp_path / split / "images" / f"{i}.png", seed=i + 10 * len(split))
            write_mask(tmp_path / split / "masks" / f"{i}.png")
            rows.append(f"{split}/images/{i}.png,{split}{i // 2}")
    data = segmentation(tmp_path, csv=csv_of(tmp_path, "path,group", rows))
    assert data.spec.num_samples == {"train": 2, "val": 2, "test": 2}
    assert data.spec.num_groups == {"train": 1, "val": 1, "test": 1}


def test_a_row_is_needed_for_every_mask(tmp_path):
    write_pairs(tmp_path, num=4)
    csv = csv_of(tmp_path, "path,group", [f"{i:03d},p{i}" for i in range(3)])
    with pytest.raises(DataError, match=r"003.png: has no row in labels.csv"):
        segmentation(tmp_path, csv=csv)


def spoil(root):
    """One of each kind of bad file among 20 pairs."""
    (root / "images" / "000.png").write_bytes(b"not an image")
    path = root / "images" / "001.png"
    path.write_bytes(path.read_bytes()[:90])
    write_mask(root / "masks" / "002.png", size=(12, 11))
    write_mask(root / "masks" / "003.png", value=9)
    (root / "masks" / "004.png").unlink()
    (root / "images" / "005.png").unlink()
    (root / "masks" / "006.png").write_bytes(b"")


def test_all_bad_files_are_reported_at_once_with_their_paths(tmp_path):
    write_pairs(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError) as caught:
        segmentation(tmp_path)
    text = str(caught.value)
    assert "the dataset has 7 bad file(s)" in text
    assert f"{tmp_path}/images/000.png: cannot identify image file" in text
    assert f"{tmp_path}/images/001.png: " in text
    assert f"masks/002.png: is 12x11, but its image {tmp_path}/images/002.png is 12x10" in text
    assert f"{tmp_path}/masks/003.png: its values 9 have no class" in text
    assert f"{tmp_path}/images/004.png: has no mask" in text
    assert f"{tmp_path}/masks/005.png: has no image" in text
    assert f"{tmp_path}/masks/006.png: " in text
    assert "dataset.on_bad_file=skip" in text


def test_skipped_files_are_counted_and_their_names_stay_out_of_the_log(tmp_path, caplog):
    write_pairs(tmp_path)
    spoil(tmp_path)
    with caplog.at_level(logging.INFO):
        data = segmentation(tmp_path, on_bad_file="skip")
    assert data.spec.num_skipped == len(data.skipped) == 7
    assert sum(data.spec.num_samples.values()) == 13
    assert "7 bad file(s) are left out" in caplog.messages
    assert "000.png" not in caplog.text


def test_samples_read_from_files_equal_those_kept_in_memory(tmp_path, monkeypatch):
    write_pairs(tmp_path)
    kept = segmentation(tmp_path)
    monkeypatch.setattr(folder_check, "_MAX_BYTES_IN_MEMORY", 0)
    read = segmentation(tmp_path)
    assert isinstance(read.train.samples, folder_check.FileSamples)
    assert read.spec == kept.spec
    for position in range(len(read.train.groups)):
        for one, other in zip(
            read.train.samples[position], kept.train.samples[position], strict=True
        ):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_fingerprint_of_files_changes_with_a_file(tmp_path, monkeypatch, folder):
    write_pairs(tmp_path)
    monkeypatch.setattr(folder_check, "_MAX_BYTES_IN_MEMORY", 0)
    data = segmentation(tmp_path)
    before = data.fingerprint
    assert segmentation(tmp_path).fingerprint == before
    name = Path(data.train.groups[0]).name
    pixels = np.array(Image.open(tmp_path / folder / name))
    pixels[5, 5] = 255 - pixels[5, 5]
    Image.fromarray(pixels).save(tmp_path / folder / name)
    assert segmentation(tmp_path).fingerprint != before


def test_file_samples_make_batches(tmp_path, monkeypatch):
    write_classes(tmp_path, a=12, b=12)
    monkeypatch.setattr(folder_check, "_MAX_BYTES_IN_MEMORY", 0)
    module = ImageDataModule(load(tmp_path), batch_size=4)
    batch = next(iter(module.train_dataloader()))
    assert batch.image.shape == (4, 1, 8, 8)
    assert batch.target.shape == (4,)


def test_exact_duplicates_across_splits_are_logged(tmp_path, caplog):
    for split in SPLITS:
        for name in ("a", "b"):
            write_image(
                tmp_path / split / name / "1.png", seed=10 * len(split) + ord(name) + ord(split[1])
            )
    write_image(tmp_path / "train" / "a" / "2.png", seed=5)
    write_image(tmp_path / "test" / "a" / "2.png", seed=5)
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert "1 exactly equal image(s) in both train and test" in caplog.text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"task": "detection"}, "'detection' is not classification or segmentation"),
        ({"on_bad_file": "ignore"}, "'ignore' is not error or skip"),
        ({"image_size": (8,)}, r"\[8\] is not \[height, width\] or one side"),
        ({"image_size": "8x8"}, "'8x8' is not a whole number or a list of them"),
        ({"image_size": 0.5}, "0.5 is not a whole number or a list of them"),
        ({"in_channels": 2}, "2 is not 1 .grey. or 3 .RGB."),
        ({"intensity_range": (5, 5)}, r"\[5, 5\] is not \[low, high\]"),
        ({"mask_classes": {0: "a", 1: "b"}}, "task=classification takes class_names instead"),
        ({"task": "segmentation", "class_names": {"a": "b"}}, "takes mask_classes instead"),
        ({"task": "segmentation", "mask_classes": {0: "a"}}, "two classes and more are needed"),
        ({"task": "segmentation", "mask_classes": {0: "a", "x": "b"}}, "are not pixel values"),
        ({"class_names": ["x", "y"]}, r"'y'\] does not map .* 'dataset.class_names={0:benign,1:m"),
        ({"class_names": "a"}, "'a' does not map to names"),
        ({"class_names": {"a": 1, "b": 2}}, "{'a': 1, 'b': 2} does not map to names"),
        ({"task": "segmentation", "mask_classes": ["a", "b"]}, "={0:background,255:lesion}'"),
        ({"modality": "xry"}, "dataset.modality: 'xry' is not known, did you mean 'xray'?"),
        ({"modality": "mri"}, "did you mean 'mr'?"),
        ({"modality": None}, "None is not known, the options are: ct, ct_patch, derm"),
        ({"val_ratio": 0.6, "test_ratio": 0.4}, "0.6 and 0.4 are not"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, options, text):
    write_classes(tmp_path, a=3, b=3)
    with pytest.raises(ConfigError, match=text):
        load(tmp_path, **options)


WBC_CLASSES = {1: "neutrophil", 2: "lymphocyte", 3: "monocyte", 4: "eosinophil", 5: "basophil"}


@needs_data
def test_white_blood_cells_are_classified_by_their_csv(caplog):
    with caplog.at_level(logging.WARNING):
        data = load(
            Path(os.environ["MEDLITE_DATA"]) / "wbc_seg" / "dataset1",
            csv="../Class_Labels_of_Dataset_1.csv",
            path_column="image ID",
            label_column="class label",
            class_names=WBC_CLASSES,
            in_channels=3,
        )
    totals = np.sum(
        [np.bincount(data.split(name).samples.targets, minlength=5) for name in SPLITS], axis=0
    )
    assert totals.tolist() == [176, 53, 48, 22, 1]
    assert data.spec.class_counts[4] == 1
    assert "class 'basophil' has no images in the test split" in caplog.messages


@needs_data
def test_white_blood_cells_are_segmented_by_their_masks():
    data = segmentation(
        Path(os.environ["MEDLITE_DATA"]) / "wbc_seg" / "dataset1",
        mask_classes={0: "background", 128: "cytoplasm", 255: "nucleus"},
        in_channels=3,
        image_size=(32, 32),
    )
    assert sum(data.spec.num_samples.values()) == 300
    assert data.spec.num_classes == 3
    assert min(data.spec.class_counts) > 0
    image, mask = data.test.samples[0]
    assert image.shape == (3, 32, 32)
    assert set(np.unique(mask)) == {0, 1, 2}
