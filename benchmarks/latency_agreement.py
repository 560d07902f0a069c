"""Latency: medlite's OpenVINO p50 beside OpenVINO's own benchmark_app, in turns in one run.

    python benchmarks/latency_agreement.py [--repeats N] [--queries N] [--threads N] [--json FILE]

Both run the same file with the same threads, hint and precision, one query after another.
benchmark_app times the inference alone, on one image that stays in the caches; medlite takes
another image each time and also times handing it in and the logits out, as an application has
to. On a busy machine look at the ratio of the quietest repeats.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import openvino
import timm
import torch
from torch import nn

from medlite.bench.benchmark import benchmark
from medlite.bench.lane import Candidate
from medlite.export.export import export
from medlite.models.ultralight_vm_unet import UltraLightVMUNet
from medlite.runtimes.openvino import OpenVinoRuntime
from medlite.types import Artifact, BenchmarkSettings, Hardware

BENCHMARK_APP = [sys.executable, "-c", "from openvino.tools.benchmark.main import main; main()"]
MODELS: dict[str, tuple[tuple[int, ...], type[nn.Module] | str]] = {
    "mobilenetv3_small": ((3, 224, 224), "mobilenetv3_small_100"),
    "resnet18": ((3, 224, 224), "resnet18"),
    "ultralight_vm_unet": ((1, 64, 64), UltraLightVMUNet),
}


def write_model(name: str, directory: Path) -> Artifact:
    """Export one model with random weights."""
    shape, model = MODELS[name]
    torch.manual_seed(0)
    net = (
        timm.create_model(model, num_classes=5, in_chans=shape[0])
        if isinstance(model, str)
        else model(in_channels=shape[0], num_classes=1)
    )
    return export(net, format="openvino", input_shape=shape, directory=directory, stem=name)


def ask_benchmark_app(artifact: Artifact, num_queries: int, num_threads: int) -> float:
    """The median latency that OpenVINO's own tool reports, in ms."""
    shape = ",".join(str(side) for side in (1, *artifact.input_shape))
    properties = {
        "INFERENCE_NUM_THREADS": str(num_threads),
        "ENABLE_CPU_PINNING": "NO",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    config = artifact.path.with_suffix(".config.json")  # its own flags refuse threads with a hint
    config.write_text(json.dumps({"CPU": properties}))
    options = {
        "-m": artifact.path, "-shape": f"[{shape}]", "-d": "CPU", "-api": "sync",
        "-hint": "latency", "-niter": num_queries, "-load_config": config, "-ip": "f32",
    }  # fmt: skip
    arguments = [str(word) for pair in options.items() for word in pair]
    run = subprocess.run([*BENCHMARK_APP, *arguments], capture_output=True, text=True, check=False)
    found = re.search(r"Median:\s+([\d.]+) (us|ms)", run.stdout)
    if found is None or "INFERENCE_PRECISION_HINT: <Type: 'float32'>" not in run.stdout:
        message = f"benchmark_app did not measure in float32:\n{run.stdout}\n{run.stderr}"
        raise SystemExit(message)
    return float(found.group(1)) * {"us": 1e-3, "ms": 1.0}[found.group(2)]


def ask_medlite(artifact: Artifact, num_queries: int, num_threads: int, directory: Path) -> float:
    """The p50 that medlite reports, in ms."""
    images = np.random.default_rng(0).normal(size=(8, *artifact.input_shape)).astype(np.float32)
    result = benchmark(
        [Candidate(artifact=artifact, runtime=OpenVinoRuntime())],
        hardware=Hardware(num_threads=num_threads),
        settings=BenchmarkSettings(
            num_queries=num_queries, throughput_seconds=0.1, energy_seconds=0
        ),
        images=images,
        directory=directory,
    )
    value = next(m.value for m in result.measurements if m.name == "latency/openvino/p50_ms")
    assert value is not None
    return value


def compare(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """One row of the table."""
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        artifact = write_model(name, directory)
        for _ in range(arguments.repeats):
            queries, threads = arguments.queries, arguments.threads
            ours.append(ask_medlite(artifact, queries, threads, directory / "bench"))
            theirs.append(ask_benchmark_app(artifact, queries, threads))
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "model": name,
        "medlite_p50_ms": statistics.median(ours),
        "benchmark_app_median_ms": statistics.median(theirs),
        "ratio_of_quietest": min(ours) / min(theirs),
        "ratio_median": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "n": arguments.repeats,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(
        f"OpenVINO {openvino.__version__}, {platform.platform()}, {os.cpu_count()} cores, "
        f"{arguments.threads} thread(s), {arguments.queries} queries each, n={arguments.repeats}"
    )
    print(
        f"{'model':20} {'medlite':>11} {'benchmark_app':>14} {'quietest':>9} {'median ratio':>13}"
    )
    rows = []
    for name in MODELS:
        row = compare(name, arguments)
        rows.append(row)
        print(
            f"{name:20} {row['medlite_p50_ms']:8.3f} ms {row['benchmark_app_median_ms']:11.3f} ms "
            f"{row['ratio_of_quietest']:9.3f} {row['ratio_median']:13.3f} "
            f"({row['ratio_min']:.3f}..{row['ratio_max']:.3f})"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
