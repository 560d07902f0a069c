"""The selective scan in all its forms beside a C++ kernel and its peers, in one run.

    python benchmarks/selective_scan.py [--quick] [--cases UL ...] [--variants torch ...]
                                        [--rounds N] [--json FILE]

One thread on one core; the processor time of the process, the variants of a case taking turns.
Times are the least of all rounds, a ratio is that of the least times, its spread the lowest and
highest ratio within one round. Errors are the largest difference from float64 over the largest
value, in training the worst of the outputs and of the six derivatives. Memory is the rise of the
peak resident set during the first call at full size in a process of its own, in units of
E = B L D N floats; the outputs are in it, the operands are not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scan_peers.cases import CASES, Case
from scan_peers.variants import PHASES, VARIANTS, Run, Unavailable, kind_of, prepare, true_values

PEAK_COMMAND = [sys.executable, str(Path(__file__).with_name("scan_peers") / "peak.py")]


class Timing(NamedTuple):
    """Processor times in ns, one a round, and the error of the result."""

    times: list[int]
    max_rel_error: float


def measure_case(
    case: Case, phase: str, variants: list[str], num_rounds: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """All rows of a case and phase, and the variants that have none with the reasons."""
    runs: dict[str, Run] = {}
    absent = []
    for variant in variants:
        try:
            runs[variant] = prepare(variant, case, phase)
        except Unavailable as reason:
            absent.append(
                {"case": case.name, "phase": phase, "variant": variant, "reason": str(reason)}
            )
    timings = take_turns(case, phase, runs, num_rounds)
    limit = timings.get("native")
    rows = [
        describe(case, phase, variant, timing, limit)
        | {"peak_elements": peak(case, phase, variant)}
        for variant, timing in timings.items()
    ]
    return rows, absent


def take_turns(case: Case, phase: str, runs: dict[str, Run], num_rounds: int) -> dict[str, Timing]:
    """Run all variants once for their errors, then in turns for their times."""
    expected = {kind: true_values(case, phase, kind) for kind in {*map(kind_of, runs)}}
    timings = {
        variant: Timing([], max(map(relative_error, run(), expected[kind_of(variant)])))
        for variant, run in runs.items()
    }
    for _ in range(num_rounds):
        for variant, run in runs.items():
            start = time.process_time_ns()
            run()
            timings[variant].times.append(time.process_time_ns() - start)
    return timings


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def describe(
    case: Case, phase: str, variant: str, timing: Timing, limit: Timing | None
) -> dict[str, Any]:
    """One row; ratios are None where the native kernel did not run."""
    per_element = [nanoseconds / case.num_elements for nanoseconds in timing.times]
    ratios = sorted(a / b for a, b in zip(timing.times, limit.times, strict=True)) if limit else []
    return {
        "case": case.name,
        "phase": phase,
        "variant": variant,
        "ns_per_element": min(per_element),
        "median_ns_per_element": statistics.median(per_element),
        "ratio_to_native": min(timing.times) / min(limit.times) if limit else None,
        "ratio_spread": [ratios[0], ratios[-1]] if limit else None,
        "n": len(per_element),
        "max_rel_error": timing.max_rel_error,
    }


def peak(case: Case, phase: str, variant: str) -> float | None:
    """Peak extra memory in units of E floats; None where the system does not tell."""
    command = [*PEAK_COMMAND, case.name, phase, variant]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    ratio, spread, memory = row["ratio_to_native"], row["ratio_spread"], row["peak_elements"]
    print(
        f"{row['case']:5}{row['phase']:10}{row['variant']:18}{row['ns_per_element']:10.3f}"
        f"{row['median_ns_per_element']:10.3f}"
        + (f"{ratio:8.2f} ({spread[0]:.2f}..{spread[1]:.2f})".ljust(28) if spread else " " * 28)
        + f"{row['max_rel_error']:10.1e}"
        + (f"{memory:10.2f}" if memory is not None else ""),
        flush=True,
    )


def use_one_core() -> str:
    """Pin the process where the system can; returns in words what was done."""
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        return "not pinned"
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return f"pinned to core {core}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two rounds of the smallest case")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cases, arguments.rounds = ["UL"], 2
    return arguments


def main() -> None:
    """Measure, print, and write."""
    arguments = parse_arguments()
    pinning = use_one_core()
    print(
        f"torch {torch.__version__}, {platform.platform()}, {platform.processor()}, one thread "
        f"{pinning}, processor time, n={arguments.rounds}; ns for one of B L D N elements"
    )
    print(
        f"{'case':5}{'phase':10}{'variant':18}{'least ns':>10}{'median':>10}"
        f"{'  to native (spread)':28}{'error':>10}{'peak / E':>10}"
    )
    rows, absent = [], []
    for name in arguments.cases:
        for phase in arguments.phases:
            measured, missing = measure_case(
                CASES[name], phase, arguments.variants, arguments.rounds
            )
            for row in measured:
                print_row(row)
            rows += measured
            absent += missing
    for entry in absent:
        print("no {case} {phase} {variant}: {reason}".format(**entry))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows, "absent": absent}, indent=2) + "\n")


if __name__ == "__main__":
    main()
