import csv
import re
import sys

import numpy as np
import pytest

from medlite.errors import MissingDependency, RecordError
from medlite.gate.prediction_files import load_file
from medlite.gate.sides import match

IDS = ("a", "b", "c", "d")
PATIENTS = ("p1", "p1", "p2", "p3")
LABELS = (0, 2, 1, 2)
PROBABILITIES = ((0.7, 0.2, 0.1), (0.1, 0.1, 0.8), (0.2, 0.5, 0.3), (0.3, 0.3, 0.4))


def write_npz(path, **changes):
    arrays = {
        "id": np.array(IDS), "patient": np.array(PATIENTS), "label": np.array(LABELS),
        "probabilities": np.array(PROBABILITIES),
    }  # fmt: skip
    arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    np.savez(path, **arrays)
    return path


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of_classes(names=("normal", "benign", "cancer")):
    return [
        {
            "id": name, "patient": patient, "label": names[label],
            **{f"probability_{k}": p for k, p in zip(names, row, strict=True)},
        }
        for name, patient, label, row in zip(IDS, PATIENTS, LABELS, PROBABILITIES, strict=True)
    ]  # fmt: skip


def softmax(logits):
    odds = np.exp(logits.astype(np.float64))
    return odds / odds.sum(1, keepdims=True)


@pytest.mark.parametrize(
    "names", [("normal", "cancer"), ("a", "normal", "benign", "cancer"), ("a", "a", "b")]
)
def test_names_that_are_not_those_of_the_scores_are_refused(tmp_path, names):
    path = write_npz(tmp_path / "a.npz", class_names=np.array(names))
    with pytest.raises(RecordError, match="expected 3 different ones, for 3 scores a sample"):
        load_file(path)


def test_npz_and_csv_hold_the_same_predictions(tmp_path):
    from_npz = load_file(
        write_npz(tmp_path / "a.npz", class_names=np.array(["normal", "benign", "cancer"]))
    )
    from_csv = load_file(write_csv(tmp_path / "a.csv", rows_of_classes()))
    for side in (from_npz, from_csv):
        np.testing.assert_allclose(softmax(side.predictions.logits), PROBABILITIES, rtol=1e-6)
        assert side.predictions.targets.tolist() == list(LABELS)
        assert (side.ids, side.predictions.groups) == (IDS, PATIENTS)
        assert side.spec.class_names == ("normal", "benign", "cancer")
        assert (side.spec.task, side.spec.labels) == ("classification", "multiclass")


def test_parquet_holds_the_same_predictions(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(rows_of_classes())
    parquet.write_table(table, tmp_path / "a.parquet")
    side = load_file(tmp_path / "a.parquet")
    np.testing.assert_allclose(softmax(side.predictions.logits), PROBABILITIES, rtol=1e-6)
    assert side.predictions.targets.tolist() == list(LABELS)


def test_parquet_without_its_package_is_told(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(MissingDependency, match=re.escape("pip install 'medlite[parquet]'")):
        load_file(tmp_path / "a.parquet")


def test_logits_are_taken_as_they_are(tmp_path):
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    side = load_file(write_npz(tmp_path / "a.npz", probabilities=None, logits=logits))
    assert (side.predictions.logits == logits).all()


def test_one_probability_is_binary_and_certainty_stays_finite(tmp_path):
    rows = [
        {"id": name, "label": label, "probability": p}
        for name, label, p in zip(IDS, (0, 1, 1, 0), (0, 1, 0.6, 0.2), strict=True)
    ]
    side = load_file(write_csv(tmp_path / "a.csv", rows))
    assert (side.spec.labels, side.spec.num_classes) == ("binary", 1)
    assert side.spec.class_names == ("negative", "positive")
    assert side.predictions.logits.shape == (4, 1)
    assert np.isfinite(side.predictions.logits).all()
    assert (side.predictions.groups, side.spec.group_kind) == (IDS, "image")


def test_a_named_probability_names_its_class(tmp_path):
    rows = [
        {"id": name, "label": label, "logit_cancer": value}
        for name, label, value in zip(
            IDS, ("cancer", "not cancer") * 2, (3, -1, 2, -4), strict=True
        )
    ]
    side = load_file(write_csv(tmp_path / "a.csv", rows))
    assert side.spec.class_names == ("not cancer", "cancer")
    assert side.predictions.targets.tolist() == [1, 0, 1, 0]


def test_a_label_for_each_class_is_multilabel(tmp_path):
    rows = [
        {"id": name, "label_edema": i % 2, "label_mass": 1, "probability_mass": 0.9,
         "probability_edema": 0.2}
        for i, name in enumerate(IDS)
    ]  # fmt: skip
    side = load_file(write_csv(tmp_path / "a.csv", rows))
    assert (side.spec.labels, side.spec.class_names) == ("multilabel", ("mass", "edema"))
    assert side.predictions.targets.tolist() == [[1, 0], [1, 1], [1, 0], [1, 1]]


def test_masks_are_a_segmentation(tmp_path):
    label = np.random.default_rng(0).integers(2, size=(4, 6, 6))
    logits = np.random.default_rng(1).normal(size=(4, 1, 6, 6))
    changed = {"label": label, "logits": logits, "spacing_mm": np.array([0.5, 0.5])}
    spec = load_file(write_npz(tmp_path / "a.npz", probabilities=None, **changed)).spec
    assert (spec.task, spec.labels, spec.image_size) == ("segmentation", "binary", (6, 6))
    assert spec.class_names == ("background", "foreground")
    assert spec.spacing_mm == (0.5, 0.5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"label": None}, "expected 'id', 'label', and either 'logits' or 'probabilities'"),
        ({"logits": np.array(PROBABILITIES)}, "and either 'logits' or 'probabilities'; found id"),
        ({"probabilities": np.array(PROBABILITIES) * 2}, "lie outside [0, 1]; give logits"),
        ({"probabilities": np.array(PROBABILITIES) / 2}, "must add up to 1"),
        ({"label": np.array([0, 3, 1, 2])}, "labels must be whole numbers from 0 to 2"),
        ({"label": np.array([0, 1, 2])}, "shapes do not go together: 4 ids, labels (3,)"),
        ({"patient": np.array(["p"])}, "scores (4, 3), 1 of patient"),
        ({"id": np.array([{}], dtype=object)}, "cannot be read as npz of plain arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_words(tmp_path, changes, text):
    path = write_npz(tmp_path / "a.npz", **changes)
    with pytest.raises(RecordError, match=re.escape(text)):
        load_file(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"label": "canzer"}, "label must be the position or the name of a class (normal, benign"),
        ({"probability_benign": "high"}, "must hold numbers in every row"),
        ({"label_lung": 1}, "label_lung do not name the classes of the scores, expected label_no"),
    ],
)
def test_columns_that_do_not_fit_are_refused_with_words(tmp_path, changes, text):
    rows = [{**row, **changes} for row in rows_of_classes()]
    with pytest.raises(RecordError, match=re.escape(text)):
        load_file(write_csv(tmp_path / "a.csv", rows))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.xlsx", "expected a run directory or a file of .npz, .parquet, .csv"),
        ("a.csv", "no such file or directory"),
    ],
)
def test_files_that_are_no_predictions_are_refused(tmp_path, name, text):
    with pytest.raises(RecordError, match=re.escape(text)):
        load_file(tmp_path / name)


def test_sides_are_matched_by_id(tmp_path):
    first = load_file(write_npz(tmp_path / "a.npz"))
    order = [2, 0, 3, 1]
    shuffled = {
        "id": np.array(IDS)[order], "patient": np.array(PATIENTS)[order],
        "label": np.array(LABELS)[order], "probabilities": np.array(PROBABILITIES)[order],
    }  # fmt: skip
    matched = match(first, load_file(write_npz(tmp_path / "b.npz", **shuffled)))
    assert (matched.logits == first.predictions.logits).all()
    assert matched.targets.tolist() == list(LABELS)
    assert matched.groups == PATIENTS


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"id": np.array(["a", "b", "c", "x"])},
            "are not about the same samples: 1 id (such as 'd') only in the first, 1 id (such as "
            "'x') only in the second",
        ),
        ({"id": np.array(["a", "b", "c", "c"])}, "1 id (such as 'c') more than once"),
        ({"label": np.array([0, 2, 2, 2])}, "disagree on the labels of 1 id (such as 'c')"),
        (
            {"patient": np.array(["p1", "p2", "p2", "p9"])},
            "disagree on the patient of 2 ids (such as 'b')",
        ),
        ({"class_names": np.array(["a", "b", "c"])}, "differ in class names: class 0, class 1,"),
        (
            {"label": np.zeros((4, 3), dtype=int)},
            "differ in labels: multiclass and multilabel; the gate compares two models of one task",
        ),
    ],
)
def test_sides_about_something_else_are_refused_with_words(tmp_path, changes, text):
    first = load_file(write_npz(tmp_path / "a.npz"))
    with pytest.raises(RecordError, match=re.escape(text)):
        match(first, load_file(write_npz(tmp_path / "b.npz", **changes)))


def test_masks_of_another_size_are_refused(tmp_path):
    sides = []
    for name, size in (("a.npz", 6), ("b.npz", 8)):
        changed = {"label": np.zeros((4, size, size), int), "logits": np.ones((4, 1, size, size))}
        sides.append(load_file(write_npz(tmp_path / name, probabilities=None, **changed)))
    with pytest.raises(RecordError, match=re.escape("labels of shapes (4, 6, 6), (4, 8, 8)")):
        match(*sides)
