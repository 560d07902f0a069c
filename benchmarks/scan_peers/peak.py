"""Child process of the benchmark: how far one call lifts the peak of the resident set.

python benchmarks/scan_peers/peak.py CASE PHASE VARIANT prints floats over B L D N, or null where
the system has no /proc.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from scan_peers.cases import CASES
from scan_peers.variants import prepare

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_resident_bytes() -> int:
    """The highest resident set since the last reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Warm up on a few tokens, so that code is loaded and compiled, then run once."""
    torch.set_num_threads(1)
    name, phase, variant = sys.argv[1:]
    case = CASES[name]
    if not RESET.exists():
        print(json.dumps(None))
        return
    prepare(variant, dataclasses.replace(case, batch=1, length=64), phase)()
    run = prepare(variant, case, phase)
    RESET.write_text("5")
    before = peak_resident_bytes()
    run()
    print(json.dumps((peak_resident_bytes() - before) / 4 / case.num_elements))


if __name__ == "__main__":
    main()
