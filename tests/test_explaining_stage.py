"""Both models are explained on the same images, in their runtimes and in torch, once."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from medlite.bench.benchmark import BenchmarkResult
from medlite.data.module import ImageDataModule
from medlite.data.phantom import phantom
from medlite.pipeline.explaining import PICTURES, explain
from medlite.safety_settings import ExplainabilitySettings, SafetyMargins
from medlite.types import Hardware

NUM_IMAGES = 3


class CountingRuntime:
    """Runs the net that is given as artifact, and counts its images."""

    format = "fake"

    def __init__(self):
        self.num_images = 0

    def load(self, artifact, hardware):
        def answer(batch):
            self.num_images += len(batch)
            with torch.no_grad():
                return artifact(torch.from_numpy(batch)).numpy()

        return answer


def make_net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).eval()  # fmt: skip


@pytest.fixture
def job(tmp_path):
    images = phantom(
        task="classification", labels="multiclass", num_classes=3, image_size=(16, 16),
        num_train=8, num_val=4, num_test=6,
    )  # fmt: skip
    config = SimpleNamespace(
        directory=tmp_path, seed=0, hardware=Hardware(), safety=SafetyMargins(num_resamples=500),
        runtime={"fake": {}}, explainability=ExplainabilitySettings(num_images=NUM_IMAGES),
    )  # fmt: skip
    return SimpleNamespace(
        config=config, data=ImageDataModule(images, batch_size=2), spec=images.spec,
        runtimes={"fake": CountingRuntime()},
    )  # fmt: skip


def run(job, deployed, baseline=None):
    nets = {"": deployed} | ({} if baseline is None else {"baseline": baseline})
    artifacts = {name: {"fake": net} for name, net in nets.items()}
    keys = ["fake"] + ["baseline/fake"] * (baseline is not None)
    bench = BenchmarkResult(predictions={key: np.zeros((6, 3), np.float32) for key in keys})
    return explain(job, nets, artifacts, bench, "key")


def rows_of(report):
    return {row["method"]: row for row in report["rows"]}


def test_a_model_and_its_twin_look_at_the_same(job):
    rows = rows_of(run(job, make_net(1), make_net(1)))
    assert list(rows) == ["occlusion", "integrated_gradients", "grad_cam", "rollout"]
    assert rows["occlusion"]["where"] == "fake"
    for method in ("occlusion", "integrated_gradients", "grad_cam"):
        assert rows[method]["rank_correlation"] == pytest.approx(1)
        assert rows[method]["top_overlap"] == 1
        assert rows[method]["inside_before"] == rows[method]["inside_after"]
    assert (rows["rollout"]["num_images"], rows["rollout"]["rank_correlation"]) == (0, None)
    assert rows["rollout"]["note"].startswith("not all layers attend")


def test_maps_without_any_shape_are_no_agreement(job):
    rows = rows_of(run(job, make_net(0), make_net(0)))  # nothing activates its last map
    assert rows["grad_cam"]["rank_correlation"] is None
    assert rows["grad_cam"]["top_overlap"] is None
    assert rows["grad_cam"]["note"].startswith("the maps are the same everywhere")


def test_another_model_looks_elsewhere(job):
    rows = rows_of(run(job, make_net(1), make_net(0)))
    assert rows["occlusion"]["rank_correlation"] < 0.9
    assert rows["grad_cam"]["rank_correlation"] < 0.9


def test_what_was_explained_is_not_explained_again(job):
    first = run(job, make_net(0), make_net(1))
    num_images = job.runtimes["fake"].num_images
    assert num_images == 2 * NUM_IMAGES * (8 * 8 + 1)
    assert run(job, make_net(0), make_net(1)) == json.loads(json.dumps(first))
    assert job.runtimes["fake"].num_images == num_images
    (job.config.directory / PICTURES).unlink()
    run(job, make_net(0), make_net(1))
    assert job.runtimes["fake"].num_images == 2 * num_images


def test_an_uncompressed_model_alone_tells_where_it_looks(job):
    rows = rows_of(run(job, make_net(0)))
    assert rows["occlusion"]["rank_correlation"] is None
    assert 0 <= rows["integrated_gradients"]["inside_after"] <= 1


def test_pictures_hold_every_map(job):
    run(job, make_net(0), make_net(1))
    with np.load(job.config.directory / PICTURES) as arrays:
        assert arrays["images"].shape == (NUM_IMAGES, 1, 16, 16)
        assert "occlusion/fake/before" in arrays.files
        assert arrays["grad_cam/torch/after"].shape == (NUM_IMAGES, 16, 16)
        assert len(arrays.files) == 1 + 2 * 3


def test_nothing_is_explained_where_it_is_switched_off(job):
    job.config.explainability.enabled = False
    assert run(job, make_net(0)) == {}
