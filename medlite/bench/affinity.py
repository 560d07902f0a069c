"""Which cores a measuring process may be held to."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection


def affinity_problem(cores: Collection[int] | None) -> str:
    """Why a process here cannot be held to these cores, in words; "" where it can."""
    if not cores:
        return ""
    asked = f"hardware.cpu_affinity={sorted(cores)}"
    if not hasattr(os, "sched_setaffinity"):
        return f"{asked} cannot be set on {sys.platform}"
    available = os.sched_getaffinity(0)
    if set(cores) <= available:
        return ""
    return f"{asked}, but this process may use only the cores {sorted(available)}"
