"""The figures of a runtime stand under the key that chose it."""

from medlite.bench.lane import Candidate
from medlite.pipeline.job import build_runtimes

TARGET = "medlite.runtimes.onnxruntime.OnnxRuntime"
NODES = {
    "onnxruntime": {"_target_": TARGET, "name": "ort"},
    "spinning": {"_target_": TARGET, "allow_spinning": True},
}


def test_every_runtime_is_named_as_its_key():
    runtimes = build_runtimes(NODES)
    keys = {Candidate(artifact=None, runtime=each).key: each for each in runtimes.values()}
    assert keys == runtimes
    assert keys["spinning"].allow_spinning


def test_a_runtime_without_a_name_of_its_own_is_named_as_well():
    assert build_runtimes({"a": {"_target_": TARGET}})["a"].name == "a"
