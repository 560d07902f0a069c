"""How fast the nets are that a compression step considers."""

import numpy as np
import pytest
import torch
from torch import nn

from medlite.pipeline.step_latency import StepLatency
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.types import BenchmarkSettings, Hardware

SETTINGS = BenchmarkSettings(num_warmup=5, num_queries=500, num_rounds=5, timeout_seconds=60)


def convolutions(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 1, 3)).eval()


@pytest.fixture
def build(tmp_path):
    def build(**hardware):
        return StepLatency(
            runtime=OnnxRuntime(),
            hardware=Hardware(num_threads=1, **hardware),
            settings=SETTINGS,
            image=np.zeros((1, 1, 64, 64), np.float32),
            reference=convolutions(64),
            directory=tmp_path / "latency",
        )

    return build


def test_a_net_of_a_fraction_of_the_work_is_faster_and_what_was_found_is_kept(build, monkeypatch):
    meter = build()
    whole_ms, small_ms = meter(convolutions(64)), meter(convolutions(2))
    assert 0 < small_ms < whole_ms
    assert list(meter.directory.glob("*/")) == []  # the exports of nets that were only tried

    def measure_again(self, net):
        raise AssertionError

    monkeypatch.setattr(StepLatency, "_medians", measure_again)
    after_a_kill = build()
    assert [after_a_kill(convolutions(width)) for width in (64, 2)] == [whole_ms, small_ms]


def test_other_nets_are_timed_by_their_ratio_to_the_reference(build, monkeypatch):
    medians = iter([[2.0], [4.0, 1.0]])  # the machine was half as fast the second time
    monkeypatch.setattr(StepLatency, "_medians", lambda self, net: next(medians))
    meter = build()
    assert (meter(convolutions(64)), meter(convolutions(8))) == (2.0, 0.5)


def test_it_says_where_it_measures(build):
    assert build(name="host").where == "onnxruntime (host)"
    elsewhere = build(name="watch", is_this_machine=False).where
    assert elsewhere == "onnxruntime (watch), measured on this host, not on the target"
