"""What cannot be measured here is refused before anything is trained."""

import os
from types import SimpleNamespace

import pytest
import torch

from medlite.errors import ConfigError, MissingDependency
from medlite.pipeline import run as pipeline
from medlite.runtimes.executorch import ExecuTorchRuntime
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.runtimes.openvino import OpenVinoRuntime
from medlite.runtimes.torch import TorchRuntime
from medlite.safety_settings import ExplainabilitySettings, RobustnessSettings, SafetyMargins
from medlite.tasks.fit import plan_once
from medlite.types import BenchmarkSettings, Hardware, TrainSettings

RUNTIMES = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVinoRuntime,
    "torch": TorchRuntime,
    "executorch": ExecuTorchRuntime,
}
TARGETS = {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in RUNTIMES.items()}


def problems_of(*, runtime="openvino", stages=("train", "compress", "export", "bench"), **sections):
    config = SimpleNamespace(
        compression={},
        runtime={runtime: {"_target_": TARGETS[runtime]}},
        stages=stages,
        benchmark=BenchmarkSettings(**sections.get("benchmark", {})),
        hardware=Hardware(**sections.get("hardware", {})),
        safety=SafetyMargins(),
        robustness=RobustnessSettings(),
        explainability=ExplainabilitySettings(),
    )
    try:
        pipeline._check_before_anything(config)
    except ConfigError as error:
        return error.problems
    return ()


def test_what_can_be_measured_passes():
    assert problems_of() == ()


def test_fewer_queries_than_rounds_are_refused():
    (problem,) = problems_of(benchmark={"num_queries": 5, "num_rounds": 10})
    assert problem.startswith("benchmark.num_queries: 5 is less than one for each of 10 rounds")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_cores_that_are_not_here_are_refused():
    (problem,) = problems_of(hardware={"cpu_affinity": [4096]})
    assert problem.startswith("hardware.cpu_affinity=[4096], but this process may use only")


def test_a_device_that_the_runtime_never_takes_is_refused():
    (problem,) = problems_of(hardware={"device": "cuda"})
    assert problem.startswith("runtime=openvino: hardware.device=cuda: OpenVINO runs on CPUs here")


def test_hardware_is_not_looked_at_where_nothing_is_measured():
    assert problems_of(stages=("train",), hardware={"device": "cuda"}) == ()


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_takes_a_cpu_and_refuses_a_gpu_that_is_not_here(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    try:
        runtime = RUNTIMES[name]()
    except MissingDependency as error:
        pytest.skip(str(error))
    assert runtime.refuses(Hardware()) == ""
    assert runtime.refuses(Hardware(device="cuda")).startswith("hardware.device=cuda")


def test_training_on_a_gpu_that_is_not_here_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    task = SimpleNamespace(settings=TrainSettings(accelerator="cuda"))
    with pytest.raises(ConfigError, match=r"train\.accelerator: 'cuda', but torch sees no CUDA"):
        plan_once(task, None, tmp_path / "plan.json")
