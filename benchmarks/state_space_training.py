"""An epoch of training on lidc_nodules with each kernel of the scan, in turns, in one run.

    python benchmarks/state_space_training.py [--models NAME ...] [--batches N] [--rounds N]
                                              [--threads N] [--json FILE]

The same network, weights and batches with the compiled loops (numba), the lanes (torch alone)
and mambapy's parallel scan in the place of medlite's: forward, loss, backward and an optimiser's
step on real batches. Processor time of the process; a ratio is that of the medians of all rounds,
its spread the lowest and highest within one round. An epoch is estimated from the batches timed.
"""

# ruff: noqa: PLR0917 - the argument order of the paper

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scan_peers.eager import scan_with_mambapy
from torch import Tensor, nn

from medlite.data.lidc import lidc_nodules
from medlite.data.module import ImageDataModule
from medlite.models.layers.scans import lanes, selective
from medlite.models.lightm_unet import LightMUNet
from medlite.models.ultralight_vm_unet import UltraLightVMUNet
from medlite.tasks.losses import build_loss
from medlite.types import Batch

BATCH_SIZE = 8

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ultralight_vm_unet": lambda: UltraLightVMUNet(in_channels=1, num_classes=1),
    "lightm_unet_1m": lambda: LightMUNet(
        in_channels=1, num_classes=1, init_filters=16, blocks_down=(1, 2, 2, 3)
    ),
}


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Scans computed by one of KERNELS."""
    if name == "mambapy":
        with mock.patch("medlite.models.layers.mamba.selective_scan", _scan_as_mambapy):
            yield
        return
    module: Any = lanes
    if name == "numba":
        from medlite.models.layers.scans import compiled as module
    with mock.patch.object(selective, "kernel_for", return_value=module):
        yield


KERNELS = {"numba": "numba", "torch": None, "mambapy": "mambapy"}
"""And the package that each needs."""


def _scan_as_mambapy(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    x, delta, B, C = (t.unsqueeze(1) for t in (x, delta, B, C))
    return scan_with_mambapy(x, delta, A[None], B, C, D[None]).squeeze(1)


def train(net: nn.Module, batches: list[Batch], loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Seconds of processor time for some batches."""
    optimizer = torch.optim.AdamW(net.parameters())
    start = time.process_time()
    for batch in batches:
        optimizer.zero_grad()
        loss(net(batch.image), batch.target).backward()
        optimizer.step()
    return time.process_time() - start


def measure(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a kernel."""
    data = ImageDataModule(lidc_nodules(), batch_size=BATCH_SIZE)
    loader, loss = data.train_dataloader(), build_loss(data.spec)
    batches = list(itertools.islice(loader, arguments.batches))
    kernels = [name for name, package in KERNELS.items() if package is None or find_spec(package)]
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    for round_ in range(arguments.rounds + 1):
        for name in kernels:
            torch.manual_seed(0)
            net = MODELS[model]()
            with kernel(name):
                took = train(net, batches, loss)
            if round_ > 0:  # the first one compiles
                seconds[name].append(took)
    return [describe(model, name, seconds, len(loader) / len(batches)) for name in kernels]


def describe(
    model: str, name: str, seconds: dict[str, list[float]], epoch: float
) -> dict[str, Any]:
    """One row; ratios are None where mambapy is not installed."""
    peer = seconds.get("mambapy")
    ratios = sorted(b / a for a, b in zip(seconds[name], peer, strict=True)) if peer else None
    return {
        "model": model,
        "kernel": name,
        "seconds_an_epoch": statistics.median(seconds[name]) * epoch,
        "times_as_fast_as_mambapy": statistics.median(peer) / statistics.median(seconds[name])
        if peer
        else None,
        "spread": [ratios[0], ratios[-1]] if ratios else None,
        "n": len(seconds[name]),
    }


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one round of the smallest model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.batches, arguments.rounds = ["ultralight_vm_unet"], 1, 1
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {platform.platform()}, {os.cpu_count()} cores, "
        f"{arguments.threads} thread(s), {arguments.batches} batches of {BATCH_SIZE}, "
        f"n={arguments.rounds} rounds in turns, processor time"
    )
    print(f"{'model':22}{'kernel':10}{'s an epoch':>12}{'x mambapy':>11}  spread")
    rows = []
    for model in arguments.models:
        for row in measure(model, arguments):
            rows.append(row)
            ratio, spread = row["times_as_fast_as_mambapy"], row["spread"]
            print(
                f"{row['model']:22}{row['kernel']:10}{row['seconds_an_epoch']:12.1f}"
                + (f"{ratio:11.2f}  {spread[0]:.2f}..{spread[1]:.2f}" if spread else ""),
                flush=True,
            )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
