"""Whole state-space models on each runtime, beside torch and a CNN of as many parameters.

    python benchmarks/state_space_models.py [--models NAME ...] [--runtimes torch NAME ...]
                                            [--queries N] [--threads N] [--quick] [--json FILE]

medlite's own benchmark: a fresh process for each candidate, single images in turns, p50 of the
wall clock. "of torch" is the p50 over that of the same model in torch, "of the CNN" over that of
the CNN in the same runtime; each is the ratio of medians of one run. Parity is the largest
difference from the network itself over the largest logit, on images of lidc_nodules (resampled
to the size of the model); the weights are random, scans weigh as much as the rest. Memory is the
peak of the process less that of one with the runtime alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from torch import nn

from medlite.bench.benchmark import BenchmarkResult, benchmark
from medlite.bench.lane import Candidate
from medlite.data.lidc import lidc_nodules
from medlite.data.module import ImageDataModule
from medlite.export.export import export_all
from medlite.models.lightm_unet import LightMUNet
from medlite.models.medmamba import MedMamba
from medlite.models.ultralight_vm_unet import UltraLightVMUNet
from medlite.runtimes.executorch import ExecuTorchRuntime
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.runtimes.openvino import OpenVinoRuntime
from medlite.runtimes.torch import TorchRuntime
from medlite.types import BenchmarkSettings, Hardware, Runtime


class Case(NamedTuple):
    """A model at its published input, and the CNN that it is compared with."""

    input_shape: tuple[int, int, int]
    build: Callable[[], nn.Module]
    build_cnn: Callable[[int], nn.Module]
    """takes the number of parameters to come close to"""


def unet_of_size(in_channels: int, num_classes: int, num_parameters: int) -> nn.Module:
    """MONAI's U-Net with the width that comes closest."""

    def build(width: int) -> nn.Module:
        features = tuple(width * factor for factor in (1, 1, 2, 4, 8, 1))
        return BasicUNet(2, in_channels, num_classes, features=features)

    return min(map(build, range(1, 33)), key=lambda net: abs(count(net) - num_parameters))


CASES = {
    "ultralight_vm_unet": Case(
        (3, 256, 256),
        lambda: UltraLightVMUNet(in_channels=3, num_classes=1),
        lambda size: unet_of_size(3, 1, size),
    ),
    "lightm_unet_1m": Case(
        (1, 128, 128),
        lambda: LightMUNet(in_channels=1, num_classes=2, init_filters=16, blocks_down=(1, 2, 2, 3)),
        lambda size: unet_of_size(1, 2, size),
    ),
    "medmamba_t": Case(
        (3, 224, 224),
        lambda: MedMamba(in_channels=3, num_classes=6),
        lambda size: timm.create_model("resnet26", num_classes=6),
    ),
}


def count(net: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


@torch.no_grad()
def enliven(net: nn.Module) -> nn.Module:
    """Larger inputs and longer steps: fresh weights all but switch scans off."""
    for name, parameter in net.named_parameters():
        if name.endswith(("x_proj.weight", "x_proj_weight")):
            parameter.mul_(5)
        elif name.endswith(("dt_proj.bias", "dt_projs_bias")):
            parameter.add_(2)
    return net.eval()


def real_images(shape: tuple[int, int, int], number: int) -> np.ndarray:
    """Test images of lidc_nodules, (N, *shape)."""
    batches = ImageDataModule(lidc_nodules(), batch_size=number).test_dataloader()
    images = next(iter(batches)).image
    resampled = F.interpolate(images, size=shape[1:], mode="bilinear", align_corners=False)
    return resampled.expand(-1, shape[0], -1, -1).contiguous().numpy()


def runtimes() -> list[Runtime]:
    """Those that are installed."""
    found: list[Runtime] = [TorchRuntime(), OnnxRuntime(), OpenVinoRuntime()]
    if find_spec("executorch") is not None:
        found.append(ExecuTorchRuntime())
    return found


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a model and of its CNN."""
    case = CASES[name]
    torch.manual_seed(0)
    model = enliven(case.build())
    nets = {"": model, "baseline": case.build_cnn(count(model)).eval()}
    images = real_images(case.input_shape, number=4)
    engines = [engine for engine in runtimes() if engine.name in arguments.runtimes]
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = {
            prefix: export_all(
                net,
                formats=[engine.format for engine in engines],
                input_shape=case.input_shape,
                directory=Path(scratch),
                stem=prefix or "model",
            )
            for prefix, net in nets.items()
        }
        result = benchmark(
            [
                Candidate(name=prefix, runtime=engine, artifact=artifacts[prefix][engine.format])
                for prefix in nets
                for engine in engines
            ],
            hardware=Hardware(num_threads=arguments.threads),
            settings=BenchmarkSettings(
                num_queries=arguments.queries,
                num_warmup=arguments.warmup,
                throughput_seconds=0.1,
                energy_seconds=0,
            ),
            images=images,
            directory=Path(scratch) / "bench",
        )
    names = {"": name, "baseline": f"CNN beside {name}"}
    return [
        {"model": names[prefix], "parameters": count(net), "runtime": engine.name}
        | describe(prefix, engine.name, result, expected=predict(net, images))
        for prefix, net in nets.items()
        for engine in engines
    ]


@torch.no_grad()
def predict(net: nn.Module, images: np.ndarray) -> np.ndarray:
    """Logits of the network itself."""
    return net(torch.from_numpy(images)).numpy()


def describe(
    prefix: str, runtime: str, result: BenchmarkResult, *, expected: np.ndarray
) -> dict[str, Any]:
    """The figures of a row; what could not be measured is None, with the reason."""
    values = {measurement.name: measurement.value for measurement in result.measurements}
    key = f"{prefix}/{runtime}" if prefix else runtime

    def ratio(of: tuple[str, str], to: tuple[str, str]) -> float | None:
        times = [values.get(f"{lane}latency/{each}/p50_ms") for lane, each in (of, to)]
        return times[0] / times[1] if times[0] and times[1] else None

    lane = f"{prefix}/" if prefix else ""
    logits = result.predictions.get(key)
    return {
        "p50_ms": values.get(f"{lane}latency/{runtime}/p50_ms"),
        "of_torch": ratio((lane, runtime), (lane, "torch")),
        "of_cnn": None if prefix else ratio(("", runtime), ("baseline/", runtime)),
        "max_rel_difference": None
        if logits is None
        else float(np.abs(logits - expected).max() / np.abs(expected).max()),
        "model_mib": values.get(f"{lane}memory/{runtime}/model_mib"),
        "disk_kib": values.get(f"{lane}size/{runtime}/disk_kib"),
        "stability": result.stability.get(key),
        "failure": result.failures.get(key),
    }


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    if row["failure"]:
        print(f"{row['model']:30}{row['runtime']:13}unavailable: {row['failure']}")
        return

    forms = {
        "p50_ms": "10.2f", "of_torch": "10.2f", "of_cnn": "10.2f", "max_rel_difference": "10.1e",
        "model_mib": "10.1f", "disk_kib": "10.0f",
    }  # fmt: skip
    cells = (" " * 10 if row[key] is None else f"{row[key]:{form}}" for key, form in forms.items())
    print(f"{row['model']:30}{row['runtime']:13}{row['parameters']:>11,}", *cells, flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runtimes", nargs="+", default=[engine.name for engine in runtimes()])
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="ten queries of the smallest model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.queries = ["ultralight_vm_unet"], 10
    return arguments


def main() -> None:
    """Measure, print, and write."""
    arguments = parse_arguments()
    print(
        f"torch {torch.__version__}, {platform.platform()}, {os.cpu_count()} cores, "
        f"{arguments.threads} thread(s), n={arguments.queries} queries in turns"
    )
    print(
        f"{'model':30}{'runtime':13}{'parameters':>11}",
        *(
            f"{title:>10}"
            for title in ("p50 ms", "of torch", "of CNN", "parity", "MiB", "disk KiB")
        ),
    )
    rows = []
    for name in arguments.models:
        for row in measure(name, arguments):
            print_row(row)
            rows.append(row)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
