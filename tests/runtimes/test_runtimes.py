"""Every runtime of conf/runtime gives torch's answer, at every batch size, and says how."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import numpy as np
import onnx
import pytest
import torch
from omegaconf import OmegaConf
from onnx import TensorProto, helper
from torch import nn

from medlite.compression.quantized_graph import calibrate, convert, prepare
from medlite.compression.quantizer import Int8Quantizer
from medlite.errors import MissingDependency
from medlite.export.export import export
from medlite.runtimes.executorch import ExecuTorchRuntime
from medlite.runtimes.executorch_program import OUTSIDE
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.runtimes.openvino import OpenVinoRuntime
from medlite.runtimes.threads import count_threads
from medlite.runtimes.torch import TorchRuntime
from medlite.types import Artifact, Hardware

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "runtime").glob("*.yaml"))
IN_INTEGERS = [OnnxRuntime(), OpenVinoRuntime(), ExecuTorchRuntime()]
RUNTIMES = [*IN_INTEGERS, TorchRuntime()]
SHAPE = (3, 16, 16)
ONE_THREAD = Hardware(num_threads=1)


def by_name(runtime):
    return runtime.name


def build(path):
    options = OmegaConf.to_container(OmegaConf.load(path))[path.stem]
    module, kind = options.pop("_target_").rsplit(".", 1)
    return getattr(import_module(module), kind)(**options)


def small_cnn():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 2, 1)).eval()


def quantise(net):
    quantizer = Int8Quantizer(keep_first_float=False, keep_last_float=False, keep_float=())
    prepared = prepare(net, SHAPE, quantizer)
    calibrate(prepared, torch.randn(16, *SHAPE), batch_size=16, method="minmax")
    return convert(prepared, SHAPE)


def images_of(num_images):
    generator = np.random.default_rng(num_images)
    return generator.normal(size=(num_images, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def nets():
    return {"fp32": small_cnn(), "int8": quantise(small_cnn())}


@pytest.fixture(scope="module")
def artifacts(nets, tmp_path_factory):
    directory = tmp_path_factory.mktemp("artifacts")
    return {
        (precision, runtime.format): export(
            net, format=runtime.format, input_shape=SHAPE, directory=directory, stem=precision
        )
        for precision, net in nets.items()
        for runtime in RUNTIMES
    }


def test_every_runtime_has_a_config_that_builds_it_with_its_own_defaults():
    assert len(CONFIGS) >= 4
    assert {path.stem: build(path) for path in CONFIGS} == {r.name: r for r in RUNTIMES}


@pytest.mark.parametrize("runtime", RUNTIMES, ids=by_name)
@pytest.mark.parametrize("num_images", [1, 2, 5])
def test_logits_are_torchs_at_every_batch_size(runtime, num_images, nets, artifacts):
    images = images_of(num_images)
    session = runtime.load(artifacts["fp32", runtime.format], ONE_THREAD)
    expected = nets["fp32"](torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(session(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES, ids=by_name)
def test_logits_stay_when_the_next_batch_runs(runtime, artifacts):
    session = runtime.load(artifacts["fp32", runtime.format], ONE_THREAD)
    first = session(images_of(3)[:1])
    kept = first.copy()
    session(images_of(3)[1:2])
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("runtime", RUNTIMES, ids=by_name)
def test_images_may_lie_in_memory_in_any_order(runtime, nets, artifacts):
    images = np.asfortranarray(images_of(2))
    session = runtime.load(artifacts["fp32", runtime.format], ONE_THREAD)
    expected = nets["fp32"](torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(session(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES, ids=by_name)
def test_quantised_graph_decides_as_in_torch(runtime, nets, artifacts):
    images = images_of(8)
    session = runtime.load(artifacts["int8", runtime.format], ONE_THREAD)
    expected = nets["int8"](torch.from_numpy(images)).detach().numpy()
    agreeing = np.mean(session(images).argmax(1) == expected.argmax(1))
    assert agreeing > 0.98


@pytest.mark.parametrize("runtime", IN_INTEGERS, ids=by_name)
def test_optimised_graph_of_a_quantised_net_computes_in_integers(runtime, artifacts):
    counts = runtime.count_operators(artifacts["int8", runtime.format], ONE_THREAD)
    assert sum(count for name, count in counts.items() if name.startswith("int8:")) >= 3


@pytest.mark.parametrize("runtime", RUNTIMES, ids=by_name)
def test_float_graph_has_no_integer_operator(runtime, artifacts):
    counts = runtime.count_operators(artifacts["fp32", runtime.format], ONE_THREAD)
    assert counts
    assert not [name for name in counts if name.startswith("int8:")]


def test_torch_counts_the_operators_of_the_program(artifacts):
    counts = TorchRuntime().count_operators(artifacts["fp32", "torch"], ONE_THREAD)
    assert counts == {"conv2d": 3, "relu": 2}


def test_executorch_tells_what_is_left_outside_of_xnnpack(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm(14), nn.Conv2d(8, 2, 3)).eval()
    options = {"input_shape": SHAPE, "directory": tmp_path, "stem": "net"}
    artifact = export(net, format="executorch", **options)
    counts = ExecuTorchRuntime().count_operators(artifact, ONE_THREAD)
    assert counts["Conv2d"] == 2
    outside = {name: count for name, count in counts.items() if name.startswith(OUTSIDE)}
    assert outside == {f"{OUTSIDE}native_layer_norm": 1}


def test_runtime_without_its_package_is_refused_when_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(MissingDependency, match=r"pip install 'medlite\[executorch\]'"):
        ExecuTorchRuntime()


def test_executorch_that_was_built_for_another_torch_is_refused(monkeypatch, artifacts):
    def fail(module, **_):
        message = "undefined symbol: torch"
        raise ImportError(message)

    runtime = ExecuTorchRuntime()
    monkeypatch.setattr("medlite.runtimes.executorch.require", fail)
    with pytest.raises(MissingDependency, match=r"undefined symbol.*pip install -U 'medlite"):
        runtime.load(artifacts["fp32", "executorch"], ONE_THREAD)


def test_onnxruntime_counts_operators_inside_the_bodies_of_loops(tmp_path):
    def info(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    body = helper.make_graph(
        [
            helper.make_node("Mul", ["state_in", "step_in"], ["state_out"]),
            helper.make_node("Erf", ["state_out"], ["step_out"]),
        ],
        "body",
        [info("state_in", 2), info("step_in", 2)],
        [info("state_out", 2), info("step_out", 2)],
    )
    scan = helper.make_node("Scan", ["start", "images"], ["end", "logits"], body=body)
    scan.attribute.append(helper.make_attribute("num_scan_inputs", 1))
    start = helper.make_tensor("start", TensorProto.FLOAT, [2], [1.0, 1.0])
    inputs, outputs = [info("images", 4, 2)], [info("end", 2), info("logits", 4, 2)]
    graph = helper.make_graph([scan], "loop", inputs, outputs, [start])
    path = tmp_path / "loop.onnx"
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    artifact = Artifact(
        path=path, files=(path,), format="onnx", input_shape=(2,), output_shape=(2,),
        precision="fp32", num_bytes=0, sha256="",
    )  # fmt: skip
    counts = OnnxRuntime().count_operators(artifact, ONE_THREAD)
    assert (counts["Scan"], counts["Mul"], counts["Erf"]) == (1, 1, 1)


@pytest.mark.parametrize("runtime", RUNTIMES, ids=by_name)
def test_runtime_describes_engine_version_and_options(runtime):
    description = runtime.describe(Hardware())
    assert description.keys() >= {"engine", "version", "backend", "options"}
    assert all(description.values())


def test_openvino_computes_floats_in_the_precision_that_it_is_told(artifacts):
    compiled = OpenVinoRuntime().compile(artifacts["fp32", "openvino"], ONE_THREAD, batch_size=1)
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.parametrize("runtime", RUNTIMES, ids=by_name)
def test_cuda_without_cuda_is_refused_with_what_it_needs(runtime, artifacts):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(MissingDependency, match=r"hardware\.device=cuda"):
        runtime.load(artifacts["fp32", runtime.format], Hardware(device="cuda"))


def test_onnx_runtime_that_falls_back_to_the_cpu_is_refused(artifacts, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    says = ["CUDAExecutionProvider", "CPUExecutionProvider"]  # as its CUDA build does anywhere
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: says)
    with pytest.raises(MissingDependency, match=r"hardware\.device=cuda, .* fell back to CPUExec"):
        OnnxRuntime().load(artifacts["fp32", "onnx"], Hardware(device="cuda"))


def test_threads_come_from_the_profile_then_its_cores_then_the_process():
    assert count_threads(Hardware(num_threads=3, cpu_affinity=[0])) == 3
    assert count_threads(Hardware(cpu_affinity=[0, 1])) == 2
    assert 1 <= count_threads(Hardware()) <= (os.cpu_count() or 1)


def run_script(script):
    words = [sys.executable, "-c", dedent(script)]
    return subprocess.run(words, check=False, capture_output=True, text=True)


def test_a_signal_after_openvino_was_used_does_not_end_the_process():
    # A core that goes on another thread takes the signal stack of this one with it.
    script = """
        import os, signal, threading
        from medlite.runtimes.openvino_core import openvino_core

        signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
        held = [openvino_core()]
        held[0].get_property("CPU", "FULL_DEVICE_NAME")
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGUSR1)
    """
    done = run_script(script)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_openvino_tells_nobody_that_it_is_used():
    script = """
        import medlite, openvino, sys
        from openvino.tools.ovc import telemetry_utils
        print(sys.modules["openvino_telemetry"], telemetry_utils.tm.__name__)
    """
    done = run_script(script)
    assert done.stdout.split() == ["None", "openvino.tools.ovc.telemetry_stub"], done.stderr
