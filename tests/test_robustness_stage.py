"""Corrupted images reach every model of a job alike, once, and not again."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medlite.bench.benchmark import BenchmarkResult
from medlite.data.module import ImageDataModule
from medlite.data.phantom import phantom
from medlite.pipeline.robustness import measure_robustness, spread_positions
from medlite.safety.corruptions import SUITES
from medlite.safety_settings import RobustnessSettings, SafetyMargins
from medlite.types import Hardware


@dataclass
class RecordingRuntime:
    """Answers with the image itself plus what a model's artifact says, and keeps what it saw."""

    format: str = "fake"
    seen: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def load(self, artifact, hardware):
        torch.set_num_threads(1)
        images = self.seen.setdefault(artifact, [])

        def answer(batch):
            assert batch.dtype == np.float32
            images.append(batch.copy())
            return batch[:, :1] + (0.6 if artifact == "shifted" else 0)

        return answer


@pytest.fixture
def job(tmp_path):
    images = phantom(
        task="segmentation", labels="binary", num_classes=1, image_size=(16, 16), num_train=8,
        num_val=4, num_test=6,
    )  # fmt: skip
    data = ImageDataModule(images, batch_size=2)
    config = SimpleNamespace(
        directory=tmp_path, seed=0, hardware=Hardware(), safety=SafetyMargins(num_resamples=500),
        runtime={"fake": {}}, robustness=RobustnessSettings(num_images=4, severities=[2, 5]),
    )  # fmt: skip
    return SimpleNamespace(
        config=config, data=data, spec=images.spec, runtimes={"fake": RecordingRuntime()}
    )


def measure(job, deployed="model"):
    shape = job.spec.image_size
    clean = np.stack([job.data.data.test.samples[p][0][:1] for p in range(6)])
    assert clean.shape == (6, 1, *shape)
    bench = BenchmarkResult(predictions={"fake": clean, "baseline/fake": clean})
    artifacts = {"": {"fake": deployed}, "baseline": {"fake": "baseline"}}
    return measure_robustness(job, artifacts, bench, "key")


def test_both_models_see_the_same_images_bit_for_bit(job):
    measure(job)
    seen = job.runtimes["fake"].seen
    assert len(seen["model"]) == len(SUITES["phantom"]) * 2 * 4  # clean ones are not run again
    assert all(len(batch) == 1 for batch in seen["model"])
    for mine, other in zip(seen["model"], seen["baseline"], strict=True):
        assert np.array_equal(mine, other)


def test_a_preprocessing_that_differs_at_deployment_is_told(job):
    [same] = measure(job).values()
    assert {row["difference"] for row in same["rows"]} == {0}
    [other] = measure_with_new_key(job, "shifted").values()
    assert all(row["compressed"] < row["baseline"] for row in other["rows"])


def measure_with_new_key(job, deployed):
    job.config.seed = 1
    return measure(job, deployed)


def test_what_was_measured_is_not_measured_again(job):
    first = measure(job)
    num_queries = len(job.runtimes["fake"].seen["model"])
    again = measure(job)
    assert len(job.runtimes["fake"].seen["model"]) == num_queries
    assert [r["verdict"] for r in again.values()] == [r["verdict"] for r in first.values()]
    job.config.robustness.severities = [1]
    assert len(measure(job)["fake"]["rows"]) == len(SUITES["phantom"])


def test_switched_off_it_loads_no_model(job):
    job.config.robustness.enabled = False
    assert measure(job) == {}
    assert job.runtimes["fake"].seen == {}


def test_the_threads_of_the_job_are_kept(job):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    measure(job)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_positions_are_spread_over_the_split():
    assert spread_positions(6, 4) == [0, 1, 3, 4]
    assert spread_positions(3, 64) == [0, 1, 2]
