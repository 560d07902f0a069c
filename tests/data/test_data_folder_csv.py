"""What a csv beside a folder of images says of them."""

import logging
import re
from pathlib import Path

import pytest
from toy_folders import (
    classes_of,
    csv_of,
    load,
    segmentation,
    write_classes,
    write_image,
    write_pairs,
)

from medlite.data.image_data import SPLITS
from medlite.errors import ConfigError, DataError


@pytest.mark.parametrize("options", [{}, {"source_column": "site"}])
def test_a_csv_tells_where_images_are_from(tmp_path, options):
    write_pairs(tmp_path)
    column = options.get("source_column", "source")
    rows = [f"{i:03d},{'north' if i % 2 else ''}" for i in range(20)]
    (tmp_path / "sites.csv").write_text("\n".join([f"path,{column}", *rows]))
    data = segmentation(tmp_path, csv="sites.csv", **options)
    for name in SPLITS:
        split = data.split(name)
        numbers = [int(Path(group).stem) for group in split.groups]
        assert split.sources == tuple("north" if number % 2 else None for number in numbers)


def test_csv_gives_labels_groups_and_splits(tmp_path):
    rows = []
    for i in range(12):
        write_image(tmp_path / "scans" / f"{i}.png", seed=i)
        split = ("train", "valid", "test")[i // 4]
        rows.append(f"scans/{i}.png,{'ab'[i % 2]},p{i // 2},{split}")
    data = load(tmp_path, csv=csv_of(tmp_path, "path,label,group,split", rows))
    assert data.spec.num_samples == {"train": 4, "val": 4, "test": 4}
    assert data.spec.num_groups == {"train": 2, "val": 2, "test": 2}
    assert data.spec.group_kind == "patient"
    assert data.test.groups == ("p4", "p4", "p5", "p5")
    assert data.test.samples.targets.tolist() == [0, 1, 0, 1]


def test_csv_may_name_files_by_number_or_stem(tmp_path):
    for i in (1, 2, 30):
        write_image(tmp_path / "images" / f"{i:04d}.png", seed=i)
    write_image(tmp_path / "images" / "left eye.png", seed=9)
    write_image(tmp_path / "images" / "0b.png", seed=10)
    rows = ["1,a,train", "0002,b,val", "30,a,test", "left eye,b,train", "0b.png,b,test"]
    csv = csv_of(tmp_path, "ID,diagnosis,fold", rows)
    columns = {"path_column": "ID", "label_column": "diagnosis", "split_column": "fold"}
    data = load(tmp_path, csv=csv, **columns)
    assert classes_of(data) == {
        "images/0001.png": "a",
        "images/0002.png": "b",
        "images/0030.png": "a",
        "images/left eye.png": "b",
        "images/0b.png": "b",
    }


def test_a_path_is_taken_before_a_name_in_another_folder(tmp_path):
    for i, path in enumerate(("1.png", "more/1.png", "2.png", "3.png")):
        write_image(tmp_path / path, seed=i)
    rows = ["1.png,a,train", "more/1.png,b,train", "2.png,a,val", "3.png,a,test"]
    data = load(tmp_path, csv=csv_of(tmp_path, "path,label,split", rows))
    assert classes_of(data)["more/1.png"] == "b"
    assert classes_of(data)["1.png"] == "a"


def test_patients_of_the_csv_never_straddle(tmp_path):
    rows = []
    for i in range(60):
        write_image(tmp_path / f"{i}.png", seed=i)
        rows.append(f"{i}.png,{'ab'[i % 2]},p{i // 3}")
    data = load(tmp_path, csv=csv_of(tmp_path, "path,label,group", rows))
    groups = [set(data.split(name).groups) for name in SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20


def test_blank_cells_for_patients_are_told(tmp_path, caplog):
    rows = []
    for i in range(30):
        write_image(tmp_path / f"{i}.png", seed=i)
        rows.append(f"{i}.png,{'ab'[i % 2]},{'' if i < 4 else i // 3}")
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path, csv=csv_of(tmp_path, "path,label,group", rows))
    assert "4 of 30 rows of labels.csv have no group" in caplog.text
    assert sum(data.spec.num_groups.values()) == 4 + 9


@pytest.mark.parametrize(
    ("columns", "options", "told"),
    [
        ("Patient_ID", {}, ["Patient_ID"]),
        ("Patient_ID", {"group_column": "Patient_ID"}, []),
        ("Patient ID,Patient Age,Patient Gender", {}, ["Patient ID"]),
        ("patient_uid,PatientAge", {}, ["patient_uid"]),
        ("Anon Patient ID", {}, ["Anon Patient ID"]),
        ("g", {}, []),
    ],
)
def test_a_column_of_patients_that_is_not_read_is_told(tmp_path, caplog, columns, options, told):
    rows = [row + ",1" * columns.count(",") for row in write_thirty(tmp_path)]
    with caplog.at_level(logging.WARNING):
        load(tmp_path, csv=csv_of(tmp_path, f"path,label,{columns}", rows), **options)
    assert re.findall("has a column '(.*?)', which is not read", caplog.text) == told


def test_a_column_of_patients_that_names_the_images_is_read(tmp_path, caplog):
    rows = []
    for i in range(30):
        write_image(tmp_path / f"p{i}.png", seed=i)
        rows.append(f"p{i},{'ab'[i % 2]}")
    with caplog.at_level(logging.WARNING):
        load(tmp_path, csv=csv_of(tmp_path, "patientId,label", rows), path_column="patientId")
    assert "which is not read" not in caplog.text


def test_the_groups_are_found_whatever_the_blanks_around_their_name(tmp_path):
    data = load(tmp_path, csv=csv_of(tmp_path, "path,label, group", write_thirty(tmp_path)))
    assert sum(data.spec.num_groups.values()) == 10


def test_a_column_of_another_case_is_told_and_not_taken(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path, csv=csv_of(tmp_path, "path,label,Group", write_thirty(tmp_path)))
    assert sum(data.spec.num_groups.values()) == 30
    assert "a column 'Group', which is not read; dataset.group_column='Group' takes" in caplog.text


def test_a_label_may_be_called_group_in_another_case(tmp_path, caplog):
    csv = csv_of(tmp_path, "path,Group,age", write_thirty(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, csv=csv, label_column="Group").spec.class_names == ("a", "b")
    assert "not read" not in caplog.text


def write_thirty(folder):
    """Thirty images of two classes and ten groups, as rows of a csv."""
    for i in range(30):
        write_image(folder / f"{i}.png", seed=i)
    return [f"{i}.png,{'ab'[i % 2]},{i // 3}" for i in range(30)]


def test_a_patient_in_two_given_splits_is_refused(tmp_path):
    rows = []
    for i, split in enumerate(("train", "val", "test")):
        write_image(tmp_path / f"{i}.png", seed=i)
        rows.append(f"{i}.png,{'aab'[i]},p{i % 2},{split}")
    with pytest.raises(DataError, match=r"lie in several splits: p0 \(train, test\)"):
        load(tmp_path, csv=csv_of(tmp_path, "path,label,group,split", rows))


def test_wrong_columns_are_named_with_the_closest(tmp_path):
    write_image(tmp_path / "1.png")
    csv = csv_of(tmp_path, "path,labels", ["1.png,a"])
    with pytest.raises(
        ConfigError, match=r"dataset.label_column: .*'label', did you mean 'labels'"
    ):
        load(tmp_path, csv=csv)


def test_a_missing_csv_is_named(tmp_path):
    with pytest.raises(DataError, match=r"dataset.csv: .*nothing.csv: No such file or directory"):
        load(tmp_path, csv="nothing.csv")


def test_a_csv_in_another_encoding_is_named(tmp_path):
    (tmp_path / "labels.csv").write_bytes("path,label\n1.png,kräftig".encode("latin-1"))
    with pytest.raises(DataError, match="is not a csv in UTF-8"):
        load(tmp_path, csv="labels.csv")


def test_all_bad_rows_of_a_csv_are_reported_at_once(tmp_path):
    for name in ("1.png", "2.png", "a/3.png", "b/3.png"):
        write_image(tmp_path / name)
    rows = ["1.png,a,train", "1.png,a,train", "4.png,a,train", "3,a,train", "2.png,,train",
            "a/3.png,b,tset", "b/3.png,b,test"]  # fmt: skip
    with pytest.raises(DataError) as caught:
        load(tmp_path, csv=csv_of(tmp_path, "path,label,split", rows))
    text = str(caught.value)
    assert "5 bad file(s)" in text
    assert "1.png: named a second time (line 3, labels.csv)" in text
    assert "4.png: no image matches (line 4, labels.csv)" in text
    assert "3: several files match (line 5, labels.csv)" in text
    assert "2.png: has no label" in text
    assert "a/3.png: split 'tset' is not train, val or test (line 7, labels.csv)" in text


def test_csv_paths_may_start_at_the_root(tmp_path):
    for i in range(3):
        write_image(tmp_path / "images" / f"{i}.png", seed=i)
    write_image(tmp_path / "images" / "images" / "2.png", seed=3)
    rows = ["images/0.png,a,train", "images/1.png,b,val", "images/2.png,a,test"]
    data = load(tmp_path, csv=csv_of(tmp_path, "path,label,split", rows))
    assert data.train.groups == ("images/0.png",)
    assert data.test.groups == ("images/images/2.png",)


def test_rows_without_an_image_are_named_where_no_class_is_left(tmp_path):
    write_image(tmp_path / "images" / "0.png")
    csv = csv_of(tmp_path, "path,label", [f"scan/{i}.png,a" for i in range(9)])
    with pytest.raises(DataError) as caught:
        load(tmp_path, csv=csv, on_bad_file="skip")
    text = str(caught.value)
    assert text.startswith("classification needs two classes and more, found: none")
    assert "images/scan/2.png: no image matches (line 4, labels.csv)\n  ... 9 of them" in text
    assert "scan/3.png" not in text


def test_images_without_a_row_are_counted(tmp_path, caplog):
    write_classes(tmp_path, x=20)
    rows = [f"x/{i:03d}.png,{'ab'[i % 2]}" for i in range(18)]
    with caplog.at_level(logging.WARNING):
        load(tmp_path, csv=csv_of(tmp_path, "path,label", rows))
    assert any(message.startswith("2 image(s) below") for message in caplog.messages)
