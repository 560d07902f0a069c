"""A deployed model that fails on a runtime is named in the verdict, and is never judged safe."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from medlite.bench.benchmark import BenchmarkResult
from medlite.pipeline.recording import _verdict
from medlite.types import Artifact, Hardware

ARTIFACT = Artifact(
    path=Path("net"), format="onnx", precision="int8", input_shape=(1, 4, 4), output_shape=(2,),
    files=(), sha256="", num_bytes=0,
)  # fmt: skip
LOGITS = np.zeros((4, 2), np.float32)


@pytest.fixture
def verdict():
    """The verdict on a model of 8-bit integers, after a benchmark that ended like this."""

    def judge(*, safety=None, has_baseline=True, **ended):
        names = ("", "baseline") if has_baseline else ("",)
        config = SimpleNamespace(hardware=Hardware())
        return _verdict(
            SimpleNamespace(runtimes={"onnxruntime": None}, config=config),
            SimpleNamespace(
                artifacts={name: {"onnx": ARTIFACT} for name in names},
                bench=BenchmarkResult(**ended),
                gains={},
            ),
            [],
            [{"passed": True}],
            safety={name: SimpleNamespace(verdict=said) for name, said in (safety or {}).items()},
        )

    return judge


def test_a_model_that_never_ran_is_named_and_nothing_is_passed(verdict):
    said = verdict(
        failures={"onnxruntime": "no memory"}, predictions={"baseline/onnxruntime": LOGITS}
    )
    assert said["unmeasured"] == ["onnxruntime"]
    assert (said["safety"], said["parity"]) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert "the deployed model could not be measured on onnxruntime" in said["summary"]
    assert "no compressed model to compare" not in said["summary"]
    assert said["quantization"] == ""


def test_another_runtime_that_passes_does_not_speak_for_the_one_that_failed(verdict):
    said = verdict(
        safety={"openvino": "PASS"},
        failures={"onnxruntime": "no memory"},
        predictions={"openvino": LOGITS},
        operators={"openvino": {"int8:Conv": 3}},
    )
    assert said["safety"] == "INCONCLUSIVE"
    assert said["quantization"] == "operators in 8 bits: 3 on openvino"


def test_parity_stands_where_all_images_were_answered_before_the_failure(verdict):
    said = verdict(
        safety={"onnxruntime": "PASS"},
        failures={"onnxruntime": "no memory for batches"},
        predictions={"onnxruntime": LOGITS},
    )
    assert (said["safety"], said["parity"]) == ("INCONCLUSIVE", "PASS")


def test_a_failed_baseline_alone_is_no_failure_of_the_deployed_model(verdict):
    said = verdict(
        safety={"onnxruntime": "PASS"},
        failures={"baseline/onnxruntime": "no memory"},
        predictions={"onnxruntime": LOGITS},
        operators={"onnxruntime": {"int8:Conv": 3}},
    )
    assert (said["unmeasured"], said["safety"]) == ([], "PASS")
