"""Whether a processor computes what was quantised: weights of 8 bits and of 7 beside torch.

    python benchmarks/int8_sums.py [--data FOLDER] [--cases NAME ...] [--outputs FOLDER]
                                   [--only-table] [--markdown FILE]

x86 processors without VNNI add two products of an 8-bit kernel in 16 bits, which is too few where
activations and weights are large. FOLDER and cases as for compression_ladder.py. Each net is
quantised after training with weights of 8 and of 7 bits; the table compares the logits of the
runtimes with those of torch, which rounds alike and adds exactly, on the whole test split. The
difference between exact kernels is that of single codes where a value lies between two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from compression_ladder import CASES, add_data, run_job

from medlite.report.environment import cpu_model, cuts_off_int8_sums
from medlite.report.lookup import number
from medlite.report.result import FILE_NAME, RunResult, read_result

CHOSEN = ("retina-mobilenetv3_small", "cells-mobileone_s0", "nodules-unet")
RECIPE = ("compression=ptq", "compression.ptq.weight_bits=8,7")
SHARED = (
    *("hardware=cpu_1_thread", "logger=none", "benchmark.num_queries=30", "control=false"),
    *("benchmark.throughput_seconds=.2", "benchmark.energy_seconds=0", "robustness.enabled=false"),
    *("shortcuts.enabled=false", "explainability.enabled=false"),
)
HEADINGS = (
    *("model", "bits of weights", "runtime", "largest difference over the largest logit", "cosine"),
    *("decisions changed", "change of the metric"),
)


def rows_of(result: RunResult) -> Iterator[list[str]]:
    """A row a runtime of the quantised net."""
    for row in result.parity:
        if "/" in row["candidate"]:
            continue
        yield [
            f"{result.dataset['name']}, {result.choices['model']}",
            str(result.config["compression"]["ptq"]["weight_bits"]),
            row["candidate"],
            number(row["max_relative_difference"]),
            f"{row['cosine']:.5f}",
            f"{row['num_flips'] / row['num_decisions']:.2%} of {row['num_decisions']:,}",
            number(row["metric_difference"]),
        ]


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CHOSEN))
    parser.add_argument("--outputs", type=Path, default=Path("outputs/int8_sums"))
    parser.add_argument("--only-table", action="store_true", help="of the jobs that are done")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    codes = []
    for case in () if arguments.only_table else arguments.cases:
        chosen = [word.replace("{data}", str(arguments.data)) for word in CASES[case]]
        codes.append(
            run_job(["-m", *RECIPE, *chosen, *SHARED, f"outputs={arguments.outputs / case}"])
        )
    cut_off = {True: "cuts off sums", False: "adds exactly", None: "not known"}
    lines = [
        f"{cpu_model()}: {cut_off[cuts_off_int8_sums()]}",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|---" * len(HEADINGS) + "|",
    ]
    for case in arguments.cases:
        paths = sorted((arguments.outputs / case).rglob(FILE_NAME))
        rows = sorted((row for path in paths for row in rows_of(read_result(path))), reverse=True)
        lines += [f"| {' | '.join(row)} |" for row in rows]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text)
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
