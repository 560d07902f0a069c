"""Joules per image, from a counter that this machine really has."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from medlite.errors import BenchmarkError, MissingDependency
from medlite.optional import require
from medlite.types import Measurement

POWERCAP = Path("/sys/class/powercap")
MIN_WINDOW_SECONDS = 10.0
MIN_UPDATE_PERIODS = 20


class EnergySource(Protocol):
    """A counter of joules that only rises."""

    name: str
    """how the number came to be, for the card"""
    update_period_seconds: float

    def read_joules(self) -> float:
        """Energy since some fixed moment."""
        ...


class RaplSource:
    """Intel's and AMD's running average power limit: the energy of the processor packages.

    Only the packages are added up: the other domains lie inside them ("core", "uncore", "dram" on
    some machines) or around them ("psys").

    Args:
        root: the sysfs folder of powercap.

    Raises:
        BenchmarkError: no package domain, or none that this user may read.
    """

    update_period_seconds = 0.001

    def __init__(self, root: Path = POWERCAP) -> None:
        packages = [
            domain
            for domain in sorted(root.glob("*-rapl:*"))
            if (domain / "name").is_file()
            and (domain / "name").read_text().strip().startswith("package")
        ]
        if not packages:
            message = f"no RAPL package under {root}"
            raise BenchmarkError(message)
        self.name = f"RAPL, {len(packages)} package(s)"
        self._counters = [_WrappingCounter(package) for package in packages]
        self.read_joules()

    def read_joules(self) -> float:
        """Energy of all packages since this object was made."""
        return sum(counter.read_joules() for counter in self._counters)


class _WrappingCounter:
    """One `energy_uj` file, which begins again at 0 after `max_energy_range_uj`."""

    def __init__(self, domain: Path) -> None:
        self._path = domain / "energy_uj"
        self._range_uj = int((domain / "max_energy_range_uj").read_text())
        self._last_uj = self._read_uj()
        self._total_uj = 0

    def read_joules(self) -> float:
        now_uj = self._read_uj()
        self._total_uj += (now_uj - self._last_uj) % self._range_uj
        self._last_uj = now_uj
        return self._total_uj / 1e6

    def _read_uj(self) -> int:
        try:
            return int(self._path.read_text())
        except PermissionError as error:
            message = (
                f"RAPL is there, but this user may not read {self._path}; let it with: "
                f"sudo chmod a+r {self._path}"
            )
            raise BenchmarkError(message) from error


class NvmlSource:
    """The total energy counter of an NVIDIA board (Volta and later), through NVML.

    NVML counts all boards of the machine, CUDA only those in CUDA_VISIBLE_DEVICES: the board is
    the first of those, which is device 0 of CUDA.

    Args:
        visible: CUDA_VISIBLE_DEVICES, indices or UUIDs; None reads the environment.

    Raises:
        BenchmarkError: no NVIDIA driver, or a board without the counter.
    """

    update_period_seconds = 0.1

    def __init__(self, visible: str | None = None) -> None:
        self._nvml: Any = require("pynvml", extra="nvml", needed_by="energy of NVIDIA boards")
        if visible is None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        first = visible.split(",")[0].strip() or "0"
        try:
            self._nvml.nvmlInit()
            self._board = self._handle(first)
            self.name = f"NVML, board {self._nvml.nvmlDeviceGetName(self._board)}"
            self.read_joules()
        except self._nvml.NVMLError as error:
            message = f"NVML gives no energy: {error}"
            raise BenchmarkError(message) from error

    def _handle(self, device: str) -> Any:
        if device.isdecimal():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(device))
        if device.startswith("GPU-"):
            return self._nvml.nvmlDeviceGetHandleByUUID(device)
        message = f"NVML counts whole boards, and CUDA_VISIBLE_DEVICES begins with {device}"
        raise BenchmarkError(message)

    def read_joules(self) -> float:
        """Energy of the board since its driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._board) / 1e3


def find_energy_source(device: str, powercap: Path = POWERCAP) -> EnergySource:
    """The counter for what runs on `device`: NVML for "cuda", RAPL for "cpu".

    Raises:
        BenchmarkError, MissingDependency: there is none; says why.
    """
    return NvmlSource() if device == "cuda" else RaplSource(powercap)


@dataclass(frozen=True, kw_only=True)
class EnergyReading:
    """One window of work between two windows of rest."""

    num_images: int
    work_seconds: float
    work_joules: float
    idle_watts: tuple[float, float]
    """mean power before and after the work"""

    def net_mj_per_image(self, idle_watts: float) -> float:
        """Energy of the work beyond what the machine takes at rest, in millijoules."""
        net_joules = self.work_joules - idle_watts * self.work_seconds
        return 1e3 * net_joules / self.num_images


def window_seconds(source: EnergySource, wanted_seconds: float) -> float:
    """`wanted_seconds`, but at least 10 s and 20 periods of the counter."""
    least = max(MIN_WINDOW_SECONDS, MIN_UPDATE_PERIODS * source.update_period_seconds)
    return max(wanted_seconds, least)


def read_energy(
    source: EnergySource,
    work: Callable[[float], int],
    seconds: float,
    *,
    rest: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> EnergyReading:
    """Rest, work and rest again, `seconds` each, reading the counter at every change.

    Args:
        source: the counter.
        work: works for about so many seconds and says how many images it did.
        seconds: length of each window, as `window_seconds` gives it.
        rest: does nothing for so many seconds.
        clock: seconds.
    """
    marks = [(clock(), source.read_joules())]
    rest(seconds)
    marks.append((clock(), source.read_joules()))
    num_images = work(seconds)
    marks.append((clock(), source.read_joules()))
    rest(seconds)
    marks.append((clock(), source.read_joules()))
    (before_s, before_j), (work_s, work_j), (after_s, after_j) = (
        (later[0] - earlier[0], later[1] - earlier[1]) for earlier, later in pairwise(marks)
    )
    return EnergyReading(
        num_images=num_images,
        work_seconds=work_s,
        work_joules=work_j,
        idle_watts=(before_j / before_s, after_j / after_s),
    )


def summarise(
    prefix: str, runtime: str, source: EnergySource, reading: EnergyReading
) -> list[Measurement]:
    """Raw, idle and net energy; the spread of the net is between the two idle powers."""
    idle_watts = sum(reading.idle_watts) / 2
    bounds = sorted(reading.net_mj_per_image(watts) for watts in reading.idle_watts)
    base = f"{prefix}energy/{runtime}"
    note = f"{source.name}; {reading.work_seconds:.1f} s of work between two equal rests"

    def measure(name: str, value: float, unit: str, spread: Sequence[float]) -> Measurement:
        return Measurement(
            name=f"{base}/{name}",
            value=value,
            unit=unit,
            n=reading.num_images,
            spread=(spread[0], spread[-1]) if spread else None,
            higher_is_better=False,
            note=note,
        )

    return [
        measure("net_mj_per_image", reading.net_mj_per_image(idle_watts), "mJ", bounds),
        measure("raw_mj_per_image", reading.net_mj_per_image(0.0), "mJ", ()),
        measure("idle_w", idle_watts, "W", sorted(reading.idle_watts)),
    ]


def unavailable(prefix: str, runtime: str, reason: str) -> list[Measurement]:
    """The same names as `summarise`, without numbers."""
    units = {"net_mj_per_image": "mJ", "raw_mj_per_image": "mJ", "idle_w": "W"}
    return [
        Measurement.unavailable(f"{prefix}energy/{runtime}/{name}", unit, reason)
        for name, unit in units.items()
    ]


NO_SOURCE = (BenchmarkError, MissingDependency)
"""what `find_energy_source` raises where the machine counts no energy"""
