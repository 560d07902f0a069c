import json
from functools import partial

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from toy_predictions import make_spec

from medlite.data.phantom import phantom
from medlite.safety.shortcuts import (
    compare_shortcuts,
    fill_in,
    hide,
    probes_of,
    shortcut_measurements,
    shortcut_statistic,
)
from medlite.types import Predictions

SIDE = 32


def marked_images(num_images=120, seed=0):
    """Noise with a lesion in the middle of one class, and a marker in the corner of it, too."""
    random = np.random.default_rng(seed)
    targets = np.arange(num_images) % 2
    images = random.normal(0, 0.1, (num_images, 1, SIDE, SIDE)).astype(np.float32)
    images[targets == 1, :, 12:20, 12:20] += 1
    images[targets == 1, :, 1:3, 1:3] += 1
    return images, targets


def looks_at(images, rows, columns):
    """A classifier that reads one place."""
    return images[:, :, rows, columns].mean((2, 3))


CORNER = partial(looks_at, rows=slice(0, 4), columns=slice(0, 4))
MIDDLE = partial(looks_at, rows=slice(12, 20), columns=slice(12, 20))


def probe(*models, images=None, region=None):
    """The report of one model, or of an uncompressed and a compressed one."""
    spec = make_spec(labels="binary", class_counts=(5, 5))
    given, targets = marked_images()
    groups = tuple(f"p{i}" for i in range(len(given)))
    views = {"clean": given} | {
        name: np.stack([hide(image, name, region) for image in given])
        for name in probes_of(spec, has_regions=region is not None)
    }
    scores = [
        {
            name: shortcut_statistic(
                Predictions(logits=model(view), targets=targets, groups=groups), spec
            )
            for name, view in views.items()
        }
        for model in models
    ]
    before = scores[0] if len(scores) > 1 else None
    report = compare_shortcuts(before, scores[-1], groups=groups, spec=spec, num_resamples=500)
    return report, {row.probe: row for row in report.rows}


def lesion():
    region = np.zeros((SIDE, SIDE), dtype=bool)
    region[12:20, 12:20] = True
    return region


def test_a_model_that_looks_at_a_corner_marker_is_suspect():
    report, rows = probe(CORNER, region=lesion())
    assert report.clean_compressed == 1
    assert rows["border_alone"].compressed == rows["finding_hidden"].compressed == 1
    assert rows["border_alone"].is_suspect
    assert rows["finding_hidden"].is_suspect
    low, high = rows["border_hidden"].interval
    assert low < 0.5 < high  # without its marker it knows nothing
    assert not rows["border_hidden"].is_suspect


def test_a_model_that_looks_at_the_lesion_is_not():
    report, rows = probe(MIDDLE, region=lesion())
    assert report.clean_compressed == 1
    assert not any(row.is_suspect for row in rows.values())
    assert rows["border_hidden"].compressed == 1
    for name in ("border_alone", "finding_hidden"):
        low, high = rows[name].interval
        assert low < 0.5 < high


def test_a_shortcut_that_compression_brought_is_told():
    _, rows = probe(MIDDLE, CORNER)
    assert list(rows) == ["border_alone", "border_hidden"]
    assert rows["border_alone"].difference > 0.3
    assert rows["border_alone"].difference_interval[0] > 0.3
    assert rows["border_hidden"].difference < -0.3


def test_hidden_pixels_take_the_value_of_a_nearest_visible_one():
    random = np.random.default_rng(0)
    image = random.normal(size=(2, 9, 7))
    is_hidden = random.random((9, 7)) < 0.7
    filled = fill_in(image, is_hidden)
    visible = np.argwhere(~is_hidden)
    assert np.array_equal(filled[:, ~is_hidden], image[:, ~is_hidden])
    for row, column in np.argwhere(is_hidden):
        distances = cdist([[row, column]], visible)[0]
        nearest = visible[distances == distances.min()]
        options = [image[:, r, c].tolist() for r, c in nearest]
        assert filled[:, row, column].tolist() in options


def test_nothing_to_hide_and_nothing_to_see():
    image = np.random.default_rng(0).normal(size=(1, 5, 5)).astype(np.float32)
    none, everything = np.zeros((5, 5), bool), np.ones((5, 5), bool)
    assert np.array_equal(fill_in(image, none), image)
    assert np.array_equal(hide(image, "finding_hidden", none), image)
    assert np.allclose(fill_in(image, everything), image.mean())


def test_volumes_are_filled_slice_by_slice():
    random = np.random.default_rng(0)
    volume = random.normal(size=(1, 8, 8, 3))
    is_hidden = random.random((8, 8, 3)) < 0.5
    is_hidden[..., 1] = True
    filled = fill_in(volume, is_hidden)
    for depth in range(3):
        assert np.array_equal(
            filled[..., depth], fill_in(volume[..., depth], is_hidden[..., depth])
        )


def test_a_finding_is_hidden_with_its_rim():
    image = np.zeros((1, SIDE, SIDE), np.float32)
    image[:, 10:22, 10:22] = 0.5  # the rim, two pixels wide
    image[:, 12:20, 12:20] = 1
    assert hide(image, "finding_hidden", lesion()).max() == 0


@pytest.mark.parametrize("num_classes", [1, 3])
def test_the_share_of_hidden_findings_that_is_still_marked(num_classes):
    labels = "binary" if num_classes == 1 else "multiclass"
    data = phantom(
        task="segmentation", labels=labels, num_classes=num_classes, image_size=(SIDE, SIDE),
        num_train=4, num_val=4, num_test=24,
    )  # fmt: skip
    samples = [data.test.samples[i] for i in range(24)]
    targets = np.stack([target for _, target in samples])
    hidden = np.stack([hide(image, "finding_hidden", mask > 0) for image, mask in samples])
    assert probes_of(data.spec, has_regions=True) == ("finding_hidden",)

    def always(_):
        """Marks the truth, whatever the image shows."""
        hot = np.eye(max(num_classes, 2), dtype=np.float32)[targets].transpose(0, 3, 1, 2)
        return 8 * (hot[:, 1:] - 0.5 if num_classes == 1 else hot)

    def never(images):
        return (
            np.full((24, num_classes, SIDE, SIDE), -9.0, np.float32)
            * np.arange(num_classes > 1, num_classes + (num_classes > 1))
            .clip(0, 1)
            .reshape(1, -1, 1, 1)
            + (num_classes == 1) * -9.0
        )

    groups = tuple(map(str, range(24)))
    for model, share in ((always, 1), (never, 0)):
        said = Predictions(logits=model(hidden), targets=targets, groups=groups)
        statistic = shortcut_statistic(said, data.spec)
        report = compare_shortcuts(
            None, {"clean": statistic, "finding_hidden": statistic}, groups=groups,
            spec=data.spec, num_resamples=500,
        )  # fmt: skip
        (row,) = report.rows
        assert (report.score, row.compressed) == ("marked", share)
        assert row.is_suspect == (share == 1)
        assert row.baseline is row.difference is None


def test_a_phantom_knows_where_its_findings_are():
    data = phantom(
        task="classification", labels="multiclass", num_classes=3, image_size=(SIDE, SIDE),
        num_train=4, num_val=4, num_test=12,
    )  # fmt: skip
    has_finding = data.test.regions.any((1, 2))
    classes = np.array([int(data.test.samples[i][1]) for i in range(12)])
    assert np.array_equal(has_finding, classes > 0)


def test_measurements_are_flat_and_finite():
    report, _ = probe(MIDDLE, CORNER)
    rows = list(shortcut_measurements("openvino", report.to_json()))
    assert [row.name for row in rows] == [
        "shortcut/openvino/border_alone_auc", "shortcut/openvino/border_hidden_auc",
    ]  # fmt: skip
    assert [row.higher_is_better for row in rows] == [False, None]
    json.dumps(report.to_json(), allow_nan=False)


def test_outputs_that_are_no_numbers_give_no_score():
    def broken(images):
        return np.full((len(images), 1), np.nan, np.float32)

    report, rows = probe(broken)
    assert report.clean_compressed is None
    assert not any(row.is_suspect for row in rows.values())
    (first, _) = shortcut_measurements("torch", report.to_json())
    assert (first.value, first.note) == (None, "not defined on these images")


def test_the_score_of_a_mask_is_the_share_of_its_pixels():
    spec = make_spec(task="segmentation", labels="binary", class_counts=(9, 1))
    targets = np.zeros((2, 4, 4), np.int64)
    targets[0, :2] = 1
    targets[1, 0] = 1
    logits = np.full((2, 1, 4, 4), -1.0, np.float32)
    logits[0, 0, 0] = 1
    said = Predictions(logits=logits, targets=targets, groups=("a", "b"))
    statistic = shortcut_statistic(said, spec)
    assert float(statistic(torch.ones(1, 2).double())) == pytest.approx(4 / 12)
