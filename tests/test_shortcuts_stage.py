"""Images without their finding reach every model of a job alike, once, and not again."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from test_robustness_stage import RecordingRuntime

from medlite.bench.benchmark import BenchmarkResult
from medlite.data.module import ImageDataModule
from medlite.data.phantom import phantom
from medlite.pipeline.shortcuts import measure_shortcuts
from medlite.safety.shortcuts import hide
from medlite.safety_settings import SafetyMargins, ShortcutSettings
from medlite.types import Hardware


@pytest.fixture
def job(tmp_path):
    images = phantom(
        task="segmentation", labels="binary", num_classes=1, image_size=(16, 16), num_train=8,
        num_val=4, num_test=6,
    )  # fmt: skip
    data = ImageDataModule(images, batch_size=2)
    config = SimpleNamespace(
        directory=tmp_path, seed=0, hardware=Hardware(), safety=SafetyMargins(num_resamples=500),
        runtime={"fake": {}}, shortcuts=ShortcutSettings(num_images=4),
    )  # fmt: skip
    return SimpleNamespace(
        config=config, data=data, spec=images.spec, runtimes={"fake": RecordingRuntime()}
    )


def measure(job):
    clean = np.stack([job.data.data.test.samples[p][0][:1] for p in range(6)])
    bench = BenchmarkResult(predictions={"fake": clean, "baseline/fake": clean})
    artifacts = {"": {"fake": "model"}, "baseline": {"fake": "baseline"}}
    return measure_shortcuts(job, artifacts, bench, "key")


def test_both_models_see_the_images_without_their_lesions_once(job):
    first = measure(job)
    seen = job.runtimes["fake"].seen
    samples = [job.data.data.test.samples[p] for p in (0, 1, 3, 4)]
    expected = [hide(image, "finding_hidden", mask > 0)[None] for image, mask in samples]
    for name in ("model", "baseline"):
        assert len(seen[name]) == 4
        assert all(map(np.array_equal, seen[name], expected))
    assert measure(job) == json.loads(json.dumps(first))
    assert len(seen["model"]) == 4
    [row] = first["fake"]["rows"]
    assert row["difference"] == 0


def test_another_number_of_images_is_measured_anew(job):
    measure(job)
    job.config.shortcuts.num_images = 6
    assert measure(job)["fake"]["num_images"] == 6


def test_nothing_is_measured_where_it_is_switched_off(job):
    job.config.shortcuts.enabled = False
    assert measure(job) == {}
    assert job.runtimes["fake"].seen == {}
