"""What a run ran on: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from medlite import __version__

PACKAGES = (
    "medlite",
    "torch",
    "lightning",
    "torchmetrics",
    "monai",
    "timm",
    "torchao",
    "torch-pruning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "executorch",
    "medmnist",
    "pylidc",
    "numpy",
    "scipy",
    "hydra-core",
    "wandb",
)


def describe_environment(seed: int) -> dict[str, Any]:
    """Everything that a reader needs to tell whether two runs are comparable.

    Args:
        seed: of the run.

    Returns:
        Plain values; None where the machine does not say.
    """
    return {
        "seed": seed,
        "python": platform.python_version(),
        "packages": package_versions(),
        "os": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cuts_off_int8_sums": cuts_off_int8_sums(),
        "num_cores": os.cpu_count(),
        "num_usable_cores": usable_cores(),
        "memory_mib": round(psutil.virtual_memory().total / 2**20),
        "cpu_governor": cpu_governor(),
        "gpu": gpu_model(),
        "git": git_state(Path(__file__).parent),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers, as far as they are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # What pip wrote of a checkout is that of the day it was installed.
    return {**versions, "medlite": __version__}


def cpu_model() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("model name", "Hardware", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cuts_off_int8_sums() -> bool | None:
    """Whether 8-bit kernels add products of 8-bit weights in 16 bits here; None: not known.

    x86 instructions before VNNI do: https://onnxruntime.ai/docs/performance/model-optimizations/
    quantization.html, "When and why do I need to try U8U8?".
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    names = cpu_flags()
    return None if names is None else not any("vnni" in name for name in names)


def cpu_flags() -> frozenset[str] | None:
    """The processor's instruction sets by Linux' names; None where it does not list them."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return None


def usable_cores() -> int | None:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_governor() -> str | None:
    """Linux' frequency policy, such as "performance"."""
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else None


def gpu_model() -> str | None:
    """The first CUDA device, if torch is loaded and sees one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and whether there are uncommitted changes, where `directory` is in a checkout."""
    commit = run_git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = run_git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "is_dirty": bool(changes)}


def run_git(directory: Path, *arguments: str) -> str | None:
    """What git prints, None where it cannot."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
