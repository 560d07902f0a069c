import logging
import os
import re
import socket
from pathlib import Path

import medmnist as package
import numpy as np
import pytest

from medlite.data import medmnist as source
from medlite.data.image_data import SPLITS
from medlite.data.medmnist import medmnist
from medlite.errors import ConfigError, DataError

needs_data = pytest.mark.skipif(
    "MEDLITE_DATA" not in os.environ, reason="MEDLITE_DATA names no folder of real data"
)


def write_npz(path, *, shape=(28, 28), labels=None, num=6, **changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for name in SPLITS:
        arrays[f"{name}_images"] = rng.integers(0, 256, (num, *shape), np.uint8)
        arrays[f"{name}_labels"] = np.arange(num)[:, None] % 2 if labels is None else labels
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})


def load(folder, flag="pneumoniamnist", **options):
    return medmnist(flag=flag, root=folder, download=False, **options)


def real(flag):
    return load(Path(os.environ["MEDLITE_DATA"]) / flag, flag)


@needs_data
def test_retinamnist_is_five_grades_in_colour():
    data = real("retinamnist")
    assert data.spec.input_shape == data.train.samples[0][0].shape == (3, 28, 28)
    assert data.spec.class_counts == (486, 128, 206, 194, 66)
    assert data.spec.class_names == ("grade_0", "grade_1", "grade_2", "grade_3", "grade_4")
    assert data.spec.num_samples == {"train": 1080, "val": 120, "test": 400}


@needs_data
def test_breastmnist_has_flat_labels_and_one_duplicate(caplog):
    with caplog.at_level(logging.WARNING):
        data = real("breastmnist")
    assert data.spec.class_counts == (147, 399)
    assert data.spec.class_names == ("malignant", "normal_benign")
    assert "1 exactly equal image(s) in both train and test" in caplog.text


@needs_data
def test_adrenalmnist3d_is_grey_volumes():
    data = real("adrenalmnist3d")
    assert data.spec.input_shape == data.train.samples[0][0].shape == (1, 28, 28, 28)
    assert data.spec.class_counts == (929, 259)
    assert data.spec.modality == "shape"


@pytest.mark.parametrize("labels", [np.arange(6) % 2, np.arange(6)[:, None] % 2])
def test_labels_may_be_flat_or_in_a_column(tmp_path, labels):
    write_npz(tmp_path / "pneumoniamnist.npz", labels=labels)
    data = load(tmp_path)
    assert [int(data.test.samples[i][1]) for i in range(6)] == [0, 1, 0, 1, 0, 1]
    assert data.spec.class_counts == (3, 3)
    assert data.spec.num_classes == 2


def test_chestmnist_is_multilabel(tmp_path):
    labels = np.random.default_rng(1).integers(0, 2, (6, 14))
    write_npz(tmp_path / "chestmnist.npz", labels=labels)
    data = load(tmp_path, "chestmnist")
    assert data.spec.labels == "multilabel"
    assert data.spec.num_classes == 14
    assert data.spec.class_counts == tuple(labels.sum(0))
    target = data.train.samples[2][1]
    assert target.dtype == np.float32
    np.testing.assert_array_equal(target, labels[2])
    assert "accuracy of .947" in data.spec.provenance


def test_intensities_go_from_minus_one_to_one(tmp_path):
    images = np.zeros((6, 28, 28), np.uint8)
    images[:, 0, 0] = 255
    images[:, 0, 1] = 51
    write_npz(tmp_path / "pneumoniamnist.npz", train_images=images)
    image, _ = load(tmp_path).train.samples[0]
    np.testing.assert_allclose(image[0, 0, :3], [1.0, -0.6, -1.0], atol=1e-6)


def test_colours_become_channels(tmp_path):
    images = np.zeros((6, 28, 28, 3), np.uint8)
    images[..., 1] = 255
    write_npz(tmp_path / "bloodmnist.npz", train_images=images, shape=(28, 28, 3))
    image, _ = load(tmp_path, "bloodmnist").train.samples[0]
    np.testing.assert_allclose(image.mean((1, 2)), [-1, 1, -1], atol=1e-6)


def test_larger_sizes_have_their_own_file(tmp_path):
    write_npz(tmp_path / "pneumoniamnist_64.npz", shape=(64, 64))
    assert load(tmp_path, size=64).spec.image_size == (64, 64)


def test_shared_lesions_of_dermamnist_are_stated(tmp_path):
    write_npz(tmp_path / "dermamnist.npz", shape=(28, 28, 3))
    assert "splits share lesions" in load(tmp_path, "dermamnist").spec.provenance


def test_every_published_set_has_a_modality_and_distinct_class_names():
    assert source._MODALITIES.keys() == package.INFO.keys()
    for info in package.INFO.values():
        names = [source._class_name(label) for label in info["label"].values()]
        assert len(set(names)) == len(names)
        assert all(name.replace("_", "").isalnum() for name in names)


def test_unknown_flag_gets_the_closest_one():
    with pytest.raises(ConfigError, match=r"has no 'retinaminst', did you mean 'retinamnist'"):
        medmnist(flag="retinaminst")


@pytest.mark.parametrize(
    ("flag", "size", "text"),
    [("pathmnist", 32, "sizes 28, 64, 128, 224, not 32"), ("organmnist3d", 128, "28, 64, not 128")],
)
def test_sizes_that_do_not_exist_are_refused(flag, size, text):
    with pytest.raises(ConfigError, match=text):
        medmnist(flag=flag, size=size)


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"pneumoniamnist.npz does not exist; .*download=true"):
        load(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 500])
def test_a_truncated_file_is_named(tmp_path, num_bytes):
    path = tmp_path / "pneumoniamnist.npz"
    write_npz(path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DataError, match=r"pneumoniamnist.npz is not a complete MedMNIST file"):
        load(tmp_path)


def test_a_file_without_a_split_is_named(tmp_path):
    write_npz(tmp_path / "pneumoniamnist.npz", val_labels=None)
    with pytest.raises(DataError, match="val_labels"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("flag", "shape", "changes", "text"),
    [
        ("retinamnist", (28, 28, 3), {"train_labels": [7, 0, 1, 2, 3, -1]},
         "train_labels hold -1, 7, which is not from 0 to 4"),
        ("retinamnist", (28, 28, 3), {"test_labels": [[0.5]] * 6}, "test_labels hold 0.5, which"),
        ("pneumoniamnist", (28, 28), {"val_labels": [0] * 5},
         "6 val_images do not go with 5 val_labels"),
        ("pneumoniamnist", (28, 28), {"val_labels": [[0] * 14] * 6},
         r"val_labels of shape \(6, 14\) are not one row of 1 an image"),
        ("retinamnist", (28, 28), {}, r"train_images of shape \(6, 28, 28\) are no RGB images"),
        ("pneumoniamnist", (28, 28, 3), {}, r"\(6, 28, 28, 3\) are no grey images"),
        ("adrenalmnist3d", (28, 28), {}, r"\(6, 28, 28\) are no grey volumes"),
        ("chestmnist", (28, 28), {}, r"shape \(6, 1\) are not one row of 14 an image"),
        ("chestmnist", (28, 28), {f"{name}_labels": [[2] * 14] * 6 for name in SPLITS},
         "val_labels hold 2, which is not from 0 to 1"),
    ],
)  # fmt: skip
def test_a_file_of_other_contents_is_refused(tmp_path, flag, shape, changes, text):
    arrays = {key: np.array(value) for key, value in changes.items()}
    write_npz(tmp_path / f"{flag}.npz", shape=shape, **arrays)
    with pytest.raises(DataError, match=r"not what MedMNIST publishes .* delete it") as caught:
        load(tmp_path, flag)
    assert re.search(text, str(caught.value))


@pytest.fixture
def silent_server(monkeypatch):
    """A server that accepts and then says nothing, in place of Zenodo."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file.npz"
        monkeypatch.setitem(package.INFO["pneumoniamnist"], "url", url)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield url


def test_a_silent_server_is_given_up(tmp_path, silent_server):
    with pytest.raises(DataError, match=r"could not be downloaded \(timed out\); fetch it by hand"):
        medmnist(root=tmp_path, timeout_seconds=0.2)
    assert socket.getdefaulttimeout() is None
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_offline_the_error_names_the_address_and_the_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(package.INFO["pneumoniamnist"], "url", "http://127.0.0.1:9/file.npz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DataError, match=r"Connection refused.*127.0.0.1:9/file.npz.*dataset.root"):
        medmnist(root=tmp_path / "new")


def test_a_present_file_is_not_downloaded(tmp_path, silent_server):
    write_npz(tmp_path / "pneumoniamnist.npz")
    assert medmnist(root=tmp_path, timeout_seconds=0.2).spec.num_samples["train"] == 6
