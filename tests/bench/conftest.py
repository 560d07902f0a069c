from dataclasses import replace

import numpy as np
import pytest

from medlite.bench.benchmark import benchmark
from medlite.bench.lane import Candidate
from medlite.types import Artifact, BenchmarkSettings, Hardware

BRIEF = BenchmarkSettings(
    num_warmup=2,
    num_queries=8,
    num_rounds=4,
    throughput_batch_size=4,
    throughput_seconds=0.01,
    energy_seconds=0,
    timeout_seconds=60,
)


@pytest.fixture
def artifact(tmp_path):
    path = tmp_path / "model.fake"
    path.write_bytes(bytes(2048))
    return Artifact(
        path=path, files=(path,), format="fake", input_shape=(1, 4, 4), output_shape=(1,),
        precision="fp32", num_bytes=2048, sha256="",
    )  # fmt: skip


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(7, 1, 4, 4)).astype(np.float32)


@pytest.fixture
def run(artifact, images, tmp_path):
    """Benchmark runtimes ({name: runtime} are candidates) with brief settings."""

    def run(candidates, *, hardware=None, images=images, **settings):
        return benchmark(
            [
                Candidate(name=name, runtime=runtime, artifact=artifact)
                for name, runtime in candidates
            ],
            hardware=hardware or Hardware(num_threads=1),
            settings=replace(BRIEF, **settings),
            images=images,
            directory=tmp_path / "bench",
        )

    return run
