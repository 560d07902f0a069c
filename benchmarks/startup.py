"""Start-up: `python -m medlite --help` beside `python -c "import hydra"`, interleaved.

    python benchmarks/startup.py [--rounds N] [--json FILE]

Reports user + system CPU seconds of each process, and the median of the paired ratios.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "import hydra": [sys.executable, "-c", "import hydra"],
    "medlite --help": [sys.executable, "-m", "medlite", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
}
ROOT = Path(__file__).parent.parent


def cpu_seconds(command: list[str]) -> float:
    """User + system seconds of one process: robust to being scheduled out."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        message = f"{command} failed"
        raise SystemExit(message)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for command in COMMANDS.values():
        cpu_seconds(command)
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.rounds):
        for name, command in COMMANDS.items():
            samples[name].append(cpu_seconds(command))
    base = samples["import hydra"]
    rows = []
    for name, values in samples.items():
        ratios = sorted(value / reference for value, reference in zip(values, base, strict=True))
        rows.append(
            {
                "command": name,
                "cpu_seconds_median": statistics.median(values),
                "ratio_median": statistics.median(ratios),
                "ratio_min": ratios[0],
                "ratio_max": ratios[-1],
                "n": len(values),
            }
        )
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print(f"{'command':16} {'CPU s':>7} {'x import hydra':>15}  (min - max, n)")
    for row in rows:
        spread = f"({row['ratio_min']:.2f} - {row['ratio_max']:.2f}, {row['n']})"
        median, ratio = row["cpu_seconds_median"], row["ratio_median"]
        print(f"{row['command']:16} {median:7.3f} {ratio:15.2f}  {spread}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
