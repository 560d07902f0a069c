"""Every model of conf/model on torch and the engines, and what FLOPs say of latency.

    python benchmarks/zoo.py [--models NAME ...] [--runtimes torch NAME ...] [--side PX]
                             [--queries N] [--threads N] [--artifacts FOLDER] [--json FILE ...]
                             [--markdown FILE]

ExecuTorch is measured where --runtimes names it: its exports of scans take minutes each, and may
be made beforehand on a busy machine (--queries 0 --artifacts FOLDER).

medlite's own benchmark: a fresh process for each runtime, single images in turns, wall clock. All
models take one-channel images of one size (3 classes), so that their costs compare; one that
cannot take it gets the size that its error names, and those for volumes a stack of slices.
Weights are random, with scans and merged branches as they are deployed. Parity is the largest
difference from torch over the largest logit, on images of lidc_nodules (resampled). Costs are
counted as `medlite audit` counts them.

Rows are written to the first --json FILE one by one; models that stand in one of the files are
taken from there, so that a run can be stopped, or be shared out to several processes and merged.

At the end the rank correlation (Spearman) of parameters, multiply-adds and memory traffic with
the p50 of each runtime, over all models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from state_space_models import enliven, predict, real_images, runtimes
from torch import nn

from medlite.bench.benchmark import BenchmarkResult, benchmark
from medlite.bench.lane import Candidate
from medlite.command_line import conf_directory
from medlite.config import build, model_config
from medlite.errors import MedliteError, ShapeError
from medlite.export.export import export
from medlite.export.layer_costs import count_layers, total
from medlite.types import Artifact, BenchmarkSettings, Hardware, Runtime

NUM_CLASSES = 3
VOLUMETRIC = {"slice_mamba_unet": (64, 64, 8), "resnet18_3d": (64, 64, 8)}
"""models that take volumes, and the size of theirs"""
COSTS = {"params": "parameters", "macs": "multiply-adds", "flops": "FLOPs with scans"} | {
    "activations": "activations",
    "memory_access_bytes": "memory traffic",
}


def build_model(name: str, size: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    """The network, and the size of its images."""
    config = model_config(name, [conf_directory()])
    facts = {"in_channels": 1, "num_classes": NUM_CLASSES, "image_size": size}
    torch.manual_seed(0)
    try:
        net = enliven(build(config, **facts, spatial_dims=len(size)))
        with torch.no_grad():
            net(torch.zeros(1, 1, *size))
    except ShapeError as error:
        proposed = re.search(r"image_size=(\d+)", str(error))
        if proposed is None:
            raise
        return build_model(name, (int(proposed[1]),) * len(size))
    return net, size


def make_images(size: tuple[int, ...]) -> np.ndarray:
    """Four real images, or one stack of slices, (B, 1, H, W[, D])."""
    shape = (1, size[0], size[1])
    if len(size) == 2:
        return real_images(shape, number=4)
    return real_images(shape, number=size[2]).transpose(1, 2, 3, 0)[None].copy()


def export_to(
    net: nn.Module, engine: Runtime, size: tuple[int, ...], directory: Path, stem: str
) -> Artifact:
    """The exported network; taken from the directory where it is there already."""
    kept = directory / f"{stem}.json"
    if kept.exists():
        return Artifact.from_json(json.loads(kept.read_text()))
    artifact = export(
        net, format=engine.format, input_shape=(1, *size), directory=directory, stem=stem
    )
    kept.write_text(json.dumps(artifact.to_json()))
    return artifact


def measure(
    name: str, arguments: argparse.Namespace, engines: list[Runtime], directory: Path
) -> dict[str, Any]:
    """One model: its costs, and a cell a runtime; artifacts go to the directory."""
    net, size = build_model(name, VOLUMETRIC.get(name, (arguments.side,) * 2))
    costs = total(count_layers(net, (1, *size)))
    images = make_images(size)
    cells: dict[str, Any] = {}
    candidates: list[Candidate] = []
    for engine in engines:
        try:
            artifact = export_to(net, engine, size, directory, f"{name}_{engine.name}")
        except MedliteError as error:
            cells[engine.name] = {"failure": str(error)}
        else:
            candidates.append(Candidate(name="", runtime=engine, artifact=artifact))
    row = {"model": name, "size_px": size, **vars(costs), "runtimes": cells}
    if arguments.queries == 0:
        return row
    settings = BenchmarkSettings(
        num_queries=arguments.queries,
        num_warmup=3,
        throughput_seconds=0.1,
        energy_seconds=0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        result = benchmark(
            candidates,
            hardware=Hardware(num_threads=arguments.threads),
            settings=settings,
            images=images,
            directory=Path(scratch),
        )
    expected = predict(net, images)
    for candidate in candidates:
        cells[candidate.runtime.name] = describe(candidate.runtime.name, result, expected)
    return row


def describe(runtime: str, result: BenchmarkResult, expected: np.ndarray) -> dict[str, Any]:
    """The figures of a cell; what could not be measured is None, or the reason of a failure."""
    values = {measurement.name: measurement.value for measurement in result.measurements}
    if runtime in result.failures:
        return {"failure": result.failures[runtime]}
    logits = result.predictions[runtime]
    return {
        "p50_ms": values.get(f"latency/{runtime}/p50_ms"),
        "p90_ms": values.get(f"latency/{runtime}/p90_ms"),
        "model_mib": values.get(f"memory/{runtime}/model_mib"),
        "disk_kib": values.get(f"size/{runtime}/disk_kib"),
        "max_rel_difference": float(np.abs(logits - expected).max() / np.abs(expected).max()),
        "stability": result.stability.get(runtime),
    }


def table_head(engines: list[Runtime]) -> str:
    """Two lines of Markdown."""
    names = ["model", "px", "parameters", "GMACs", "GFLOPs"]
    names += [f"{engine.name}: p50 / p90 ms, MiB, KiB, parity" for engine in engines]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def table_row(row: dict[str, Any], engines: list[Runtime]) -> str:
    """One line of Markdown; "-" where a runtime cannot have the model."""
    words = [row["model"], size_text(row["size_px"]), f"{row['params']:,}"]
    words += [f"{row['macs'] / 1e9:.3f}", f"{row['flops'] / 1e9:.3f}"]
    words += [cell_text(row["runtimes"][engine.name]) for engine in engines]
    return f"| {' | '.join(words)} |"


def size_text(size: Sequence[int]) -> str:
    """A square by its side."""
    return str(size[0]) if len(size) == 2 else "x".join(map(str, size))


def cell_text(cell: dict[str, Any]) -> str:
    """What a runtime does with a model, in short."""
    if "failure" in cell:
        return "-"
    p90 = "-" if cell["p90_ms"] is None else f"{cell['p90_ms']:.1f}"
    return (
        f"{cell['p50_ms']:.1f} / {p90}, {cell['model_mib']:.0f}, {cell['disk_kib']:,.0f}, "
        f"{cell['max_rel_difference']:.0e}"
    )


def correlations(rows: list[dict[str, Any]]) -> list[str]:
    """How well the order of each cost is the order of the latency of each runtime, as Markdown."""
    names = list(rows[0]["runtimes"])
    lines = [f"| rank correlation with p50 | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for cost, words in COSTS.items():
        cells = []
        for name in names:
            timed = [row for row in rows if row["runtimes"][name].get("p50_ms")]
            times = [row["runtimes"][name]["p50_ms"] for row in timed]
            rank = spearmanr([row[cost] for row in timed], times).statistic if timed else np.nan
            cells.append(f"{rank:.2f} (n = {len(timed)})")
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Of an earlier run; none if there was none."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def heading(arguments: argparse.Namespace) -> str:
    """Machine, versions, and how it was measured."""
    engines = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino"))
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} thread(s), {engines}; "
        f"n = {arguments.queries} queries in turns, one image of one channel"
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    options = sorted(path.stem for path in (conf_directory() / "model").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=options, default=options)
    parser.add_argument("--runtimes", nargs="+", default=["torch", "onnxruntime", "openvino"])
    parser.add_argument("--side", type=int, default=128, help="of the images, in pixels")
    parser.add_argument(
        "--queries", type=int, default=64, help="64 are the least for a p90; 0: only export"
    )
    parser.add_argument("--artifacts", type=Path, help="keep exported models here, and use them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, nargs="+", default=[])
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write."""
    arguments = parse_arguments()
    engines = [engine for engine in runtimes() if engine.name in arguments.runtimes]
    lines = [heading(arguments), "", *table_head(engines).splitlines()]
    print("\n".join(lines), flush=True)
    known = {row["model"]: row for path in arguments.json for row in read_rows(path)}
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            directory = arguments.artifacts or Path(scratch)
            directory.mkdir(exist_ok=True)
            row = known.get(name) or measure(name, arguments, engines, directory)
        if arguments.queries == 0:
            print(f"exported {name}", flush=True)
            continue
        rows.append(row)
        if arguments.json:
            arguments.json[0].write_text(json.dumps({"rows": rows}, indent=2) + "\n")
        lines.append(table_row(row, engines))
        print(lines[-1], flush=True)
    if not rows:
        return
    failures = [
        f"- {row['model']} on {name}: {cell['failure'].splitlines()[0]}"
        for row in rows
        for name, cell in row["runtimes"].items()
        if "failure" in cell
    ]
    ending = ["", *correlations(rows), "", *failures]
    print("\n".join(ending))
    if arguments.markdown is not None:
        arguments.markdown.write_text("\n".join(lines + ending) + "\n")


if __name__ == "__main__":
    main()
