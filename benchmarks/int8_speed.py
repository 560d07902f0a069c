"""Where INT8 pays: quantised networks beside their float selves on each engine.

    python benchmarks/int8_speed.py [--models NAME ...] [--runtimes NAME ...] [--side PX]
                                    [--queries N] [--threads N] [--json FILE] [--markdown FILE]

Post-training quantisation of conf/compression/ptq.yaml, of networks with random weights (their
latency is that of trained ones) and ranges from images of lidc_nodules. medlite's own benchmark:
a fresh process a candidate, queries of the float and the quantised network in turns. A cell is
the speed-up with its 95 % interval, the p50 of the float network, the share of its size on disk,
and the operators that the engine computes in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from state_space_models import runtimes
from torch import nn
from zoo import NUM_CLASSES, build_model, make_images

from medlite.bench.benchmark import BenchmarkResult, benchmark
from medlite.bench.lane import Candidate
from medlite.command_line import conf_directory
from medlite.config import build, step_config
from medlite.export.export import export
from medlite.types import (
    BenchmarkSettings,
    CompressionContext,
    DataSpec,
    Hardware,
    Runtime,
)

MODELS = (
    *("unet", "unet_classic", "mk_unet", "mobilenetv2", "mobilenetv3_small", "mobileone_s0"),
    *("resnet18", "mobilevit_xs", "efficientformerv2_s0", "vit_tiny", "segformer_b0"),
    *("ultralight_vm_unet", "medmamba_lite", "lightm_unet_1m"),
)


def quantise(net: nn.Module, size: tuple[int, ...]) -> nn.Module:
    """The INT8 graph of a network."""
    images = torch.from_numpy(make_images(size))
    spec = DataSpec(
        name="lidc_nodules",
        task="classification",
        labels="multiclass",
        in_channels=1,
        num_classes=NUM_CLASSES,
        image_size=size,
        class_names=tuple("abc"),
        class_counts=(1, 1, 1),
        num_samples={},
        num_groups={},
        group_kind="patient",
        modality="ct",
        provenance="semi-synthetic",
        origin="LIDC-IDRI",
        preprocessing="resampled",
    )

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    context = CompressionContext(
        spec=spec,
        fit=refuse,
        calibration_images=lambda number: images[:number],
        calibration_batches=refuse,
        validation_batches=refuse,
        build_teacher=refuse,
        report=lambda topic, text: None,
    )
    quantised, _ = build(step_config("ptq", [conf_directory()])).apply(net, context)
    return quantised


def measure(name: str, arguments: argparse.Namespace, engines: list[Runtime]) -> dict[str, Any]:
    """One network: a cell a runtime."""
    net, size = build_model(name, (arguments.side,) * 2)
    nets = {"": quantise(net, size), "baseline": net}
    candidates = []
    with tempfile.TemporaryDirectory() as scratch:
        for engine in engines:
            for key, each in nets.items():
                artifact = export(
                    each,
                    format=engine.format,
                    input_shape=(1, *size),
                    directory=Path(scratch),
                    stem=f"{engine.name}_{key or 'int8'}",
                )
                candidates.append(Candidate(name=key, runtime=engine, artifact=artifact))
        settings = BenchmarkSettings(
            num_queries=arguments.queries, num_warmup=5, throughput_seconds=0.1, energy_seconds=0
        )
        result = benchmark(
            candidates,
            hardware=Hardware(num_threads=arguments.threads),
            settings=settings,
            images=make_images(size),
            directory=Path(scratch) / "bench",
        )
    cells = {engine.name: describe(engine.name, result) for engine in engines}
    return {"model": name, "size_px": size, "runtimes": cells}


def describe(runtime: str, result: BenchmarkResult) -> dict[str, Any]:
    """The figures of a cell."""
    found = {measurement.name: measurement for measurement in result.measurements}
    speedup = found[f"speedup/{runtime}/ratio"]
    sizes = [found[f"{prefix}size/{runtime}/disk_kib"].value or 0 for prefix in ("", "baseline/")]
    counts = result.operators[runtime]
    return {
        "speedup": speedup.value,
        "interval": speedup.spread,
        "n": speedup.n,
        "baseline_p50_ms": found[f"baseline/latency/{runtime}/p50_ms"].value,
        "size_ratio": sizes[0] / sizes[1],
        "int8_operators": sum(n for op, n in counts.items() if op.startswith("int8:")),
        "stability": result.stability[runtime],
    }


def cell_text(cell: dict[str, Any]) -> str:
    """A cell in short."""
    low, high = cell["interval"]
    return (
        f"**{cell['speedup']:.2f}** ({low:.2f} to {high:.2f}), {cell['baseline_p50_ms']:.1f} ms, "
        f"{cell['size_ratio']:.2f}, {cell['int8_operators']}"
    )


def main() -> None:
    """Measure, print, and write."""
    names = sorted(path.stem for path in (conf_directory() / "model").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=names, default=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    engines = [engine for engine in runtimes() if engine.name in arguments.runtimes]
    used = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino"))
    headings = [f"{each.name}: speed-up, float p50, size, INT8 operators" for each in engines]
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} thread(s), {used}; "
        f"n = {arguments.queries} queries in turns, one image of one channel",
        "",
        f"| model | px | {' | '.join(headings)} |",
        f"|{'---|' * (2 + len(engines))}",
    ]
    print("\n".join(lines), flush=True)
    rows = []
    for name in arguments.models:
        rows.append(measure(name, arguments, engines))
        cells = [cell_text(cell) for cell in rows[-1]["runtimes"].values()]
        lines.append(f"| {name} | {rows[-1]['size_px'][0]} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    if arguments.markdown is not None:
        arguments.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
