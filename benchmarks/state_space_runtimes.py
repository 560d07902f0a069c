"""Where state-space models run: every model on every runtime, as a table in Markdown.

    python benchmarks/state_space_runtimes.py [--models NAME ...] [--runtimes torch NAME ...]
                                              [--kinds s6 ssd] [--json FILE]

Exports to ExecuTorch take minutes a model.

Every model of conf/model that holds a scan, as its file has it, on one image of 64x64 pixels (or
64x64x8 voxels) of lidc_nodules; weights are random, with scans that weigh as much as the rest. A
cell is the largest difference from torch over the largest logit, and the time of one image over
that of torch, least of some calls in turns, one thread; "-" where the runtime cannot have it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from state_space_models import enliven, real_images, runtimes
from torch import nn

from medlite.command_line import conf_directory
from medlite.config import build, model_config
from medlite.errors import MedliteError
from medlite.export.export import export
from medlite.types import Hardware, Runtime

SIDE, DEPTH = 64, 8
VOLUMETRIC = {"slice_mamba_unet": (1, SIDE, SIDE, DEPTH)}
ALSO_VOLUMETRIC = {"lightm_unet_1m": (1, SIDE, SIDE, DEPTH)}
NUM_CALLS = 5


def rows_to_measure(names: list[str], kinds: list[str]) -> Iterator[tuple[str, Any, Any]]:
    """(label, configuration, input shape) of all models that hold a scan."""
    for name in names:
        config = model_config(name, [conf_directory()])
        if not {"ssm", "d_state"} & set(config):
            continue
        shapes = [VOLUMETRIC.get(name, (1, SIDE, SIDE))]
        shapes += [ALSO_VOLUMETRIC[name]] if name in ALSO_VOLUMETRIC else []
        for kind, shape in itertools.product(kinds if "ssm" in config else ["s6"], shapes):
            changed = copy.deepcopy(config)
            if "ssm" in config:
                changed["ssm"]["kind"] = kind
            label = name + (" 3-D" if len(shape) == 4 else "")
            yield label if kind == "s6" else f"{label}, ssd", changed, shape


def make_net(config: dict[str, Any], shape: tuple[int, ...]) -> nn.Module:
    """The network with scans that count."""
    torch.manual_seed(0)
    facts = {"in_channels": 1, "num_classes": 3, "image_size": shape[1:]}
    return enliven(build(config, **facts, spatial_dims=len(shape) - 1))


def make_images(shape: tuple[int, ...]) -> np.ndarray:
    """One real image, or a stack of some."""
    if len(shape) == 3:
        return real_images((1, SIDE, SIDE), number=1)
    return real_images((1, SIDE, SIDE), number=DEPTH).transpose(1, 2, 3, 0)[None].copy()


def measure(net: nn.Module, shape: tuple[int, ...], engines: list[Runtime]) -> dict[str, Any]:
    """By runtime: what the cell says, or why there is none."""
    images, sessions = make_images(shape), {}
    cells: dict[str, dict[str, Any]] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        expected = net(torch.from_numpy(images)).numpy()
        for engine in engines:
            try:
                start = time.perf_counter()
                artifact = export(
                    net,
                    format=engine.format,
                    input_shape=shape,
                    directory=Path(scratch),
                    stem=engine.name,
                )
                seconds = time.perf_counter() - start
                session = engine.load(artifact, Hardware(num_threads=1))
                actual = session(images)
            except MedliteError as error:
                cells[engine.name] = {"failure": str(error)}
                continue
            sessions[engine.name] = session
            difference = np.abs(actual - expected).max() / np.abs(expected).max()
            cells[engine.name] = {
                "max_rel_difference": float(difference),
                "export_seconds": seconds,
                "disk_kib": artifact.num_bytes / 1024,
            }
        for name, milliseconds in take_turns(sessions, images).items():
            cells[name]["ms"] = milliseconds
    return cells


def take_turns(sessions: dict[str, Any], images: np.ndarray) -> dict[str, float]:
    """The least time of a call, in ms."""
    least = dict.fromkeys(sessions, float("inf"))
    for _ in range(NUM_CALLS):
        for name, session in sessions.items():
            start = time.perf_counter()
            session(images)
            least[name] = min(least[name], 1e3 * (time.perf_counter() - start))
    return least


def print_row(label: str, parameters: int, cells: dict[str, Any]) -> None:
    """One line of the table."""
    words = []
    for name, cell in cells.items():
        if "failure" in cell:
            words.append("-")
        elif name == "torch":
            words.append(f"{cell['ms']:.1f} ms")
        else:
            ratio = cell["ms"] / cells["torch"]["ms"]
            words.append(f"{cell['max_rel_difference']:.0e}, {ratio:.2f}")
    print(f"| {label} | {parameters:,} | {' | '.join(words)} |", flush=True)


def main() -> None:
    """Measure, print, and write."""
    names = sorted(path.stem for path in (conf_directory() / "model").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--runtimes", nargs="+", default=[engine.name for engine in runtimes()])
    parser.add_argument("--kinds", nargs="+", choices=["s6", "ssd"], default=["s6"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engines = [engine for engine in runtimes() if engine.name in arguments.runtimes]
    print(f"| model | parameters | {' | '.join(engine.name for engine in engines)} |")
    print("|---" * (2 + len(engines)) + "|")
    rows, failures = [], []
    for label, config, shape in rows_to_measure(arguments.models, arguments.kinds):
        net = make_net(config, shape)
        cells = measure(net, shape, engines)
        parameters = sum(parameter.numel() for parameter in net.parameters())
        print_row(label, parameters, cells)
        rows.append({"model": label, "parameters": parameters, "runtimes": cells})
        failures += [
            f"{label} on {name}: {cell['failure']}"
            for name, cell in cells.items()
            if "failure" in cell
        ]
    print("\n".join(failures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
