"""Accuracy beside latency of both kinds of scan, by whole jobs of medlite on real data.

    python benchmarks/scan_kinds.py [--seeds N ...] [--epochs N] [--quick] [--json FILE]

Trains the same network with the scan of Mamba (s6) and with that of Mamba-2 (ssd) by
`experiment=scan_kinds`, once a seed, on lidc_nodules (segmentation, UltraLight VM-UNet) and, where
MEDLITE_DATA names a folder with it, on retinamnist (classification, MedMambaLite-style). Metrics
are those of the runtime's own outputs on the test split; mean and standard deviation over seeds.
Latencies are p50 of each job's own benchmark, not in turns: for ratios see selective_scan.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUNTIMES = ("onnxruntime", "openvino")
DATA = os.environ.get("MEDLITE_DATA")
JOBS = {"lidc_nodules": ("dice", ["model=ultralight_vm_unet"])}
if DATA:
    RETINA = ["dataset=medmnist", "dataset.flag=retinamnist", f"dataset.root={DATA}/retinamnist"]
    JOBS["retinamnist"] = ("auc", [*RETINA, "model=medmamba_lite"])


def run(words: list[str], kind: str, seed: int, epochs: int) -> dict[str, float]:
    """All measurements of one job."""
    with tempfile.TemporaryDirectory() as outputs:
        command = [sys.executable, "-m", "medlite", "experiment=scan_kinds", *words]
        command += [f"model.ssm.kind={kind}", f"seed={seed}", f"train.epochs={epochs}"]
        command += [f"outputs={outputs}", "logger=none", "hardware=cpu_1_thread"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        result = next(Path(outputs).glob("runs/*/result.json"))
        measurements = json.loads(result.read_text())["measurements"]
    return {each["name"]: each["value"] for each in measurements}


def describe(data: str, kind: str, metric: str, jobs: list[dict[str, float]]) -> dict[str, Any]:
    """One row: mean and standard deviation over seeds."""
    row: dict[str, Any] = {"data": data, "kind": kind, "metric": metric, "n": len(jobs)}
    for runtime in RUNTIMES:
        values = [job[f"test/{runtime}/{metric}"] for job in jobs]
        row[runtime] = {
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "p50_ms": min(job[f"latency/{runtime}/p50_ms"] for job in jobs),
        }
    return row


def main() -> None:
    """Train, measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.epochs = [0], 1
    print(f"{len(arguments.seeds)} seeds, {arguments.epochs} epochs, one thread")
    rows = []
    for data in arguments.data:
        metric, words = JOBS[data]
        for kind in ("s6", "ssd"):
            jobs = [run(words, kind, seed, arguments.epochs) for seed in arguments.seeds]
            rows.append(describe(data, kind, metric, jobs))
            cells = (
                f"{runtime} {cell['mean']:.3f} (sd {cell['sd'] or 0:.3f}), {cell['p50_ms']:.2f} ms"
                for runtime, cell in ((name, rows[-1][name]) for name in RUNTIMES)
            )
            print(f"{data:14}{kind:5}{metric:6}", "; ".join(cells), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
