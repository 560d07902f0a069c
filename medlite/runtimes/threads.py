"""How many threads a session gets."""

from __future__ import annotations

import os

from medlite.types import Hardware


def count_threads(hardware: Hardware) -> int:
    """The threads of `hardware`; where it sets none, one for each core it may use."""
    if hardware.num_threads is not None:
        return hardware.num_threads
    if hardware.cpu_affinity:
        return len(hardware.cpu_affinity)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
