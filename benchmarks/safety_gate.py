"""What the safety gate says of compressed models on real data.

    python benchmarks/safety_gate.py [--data FOLDER] [--cases NAME ...] [--seed N]
                                     [--outputs FOLDER] [--only-table] [--markdown FILE]

FOLDER as for compression_ladder.py, whose cases these are: retinamnist (diabetic retinopathy, grade
4 is rare) and 300 white blood cells (Zheng et al. 2018). Post-training quantisation,
quantisation-aware training, and pruning of 50, 70 and 90 % of the channels, each against the same
baseline, on one thread. Jobs that are done are not done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compression_ladder import CASES, add_data, run_job

from medlite.report.card_categories import rare_text
from medlite.report.lookup import number
from medlite.report.result import FILE_NAME, RunResult, read_result

CHOSEN = ("retina-mobilenetv3_small", "cells-mobileone_s0")
RECIPES = (
    ("compression=ptq,qat",),
    ("compression=prune", "compression.prune.ratio=0.5,0.7,0.9"),
)
SHARED = (
    *("hardware=cpu_1_thread", "logger=none", "benchmark.num_queries=64", "control=false"),
    *("benchmark.throughput_seconds=.2", "benchmark.energy_seconds=0"),
)
HEADINGS = (
    *("model", "recipe", "runtime", "verdict", "metric", "ECE", "decisions changed"),
    *("rarest class", "FAIL", "INCONCLUSIVE"),
)


def commands(case: str, arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The words that run one case."""
    words = [word.format(data=arguments.data) if "{data}" in word else word for word in CASES[case]]
    rest = [*words, *SHARED, f"seed={arguments.seed}", f"outputs={arguments.outputs / case}"]
    for recipe in RECIPES:
        yield ["-m", *recipe, *rest]


def rows_of(result: RunResult) -> Iterator[list[str]]:
    """A row a runtime."""
    steps = result.config["compression"]
    recipe = "+".join(steps)
    if "prune" in steps:
        recipe += f" {steps['prune']['ratio']:.0%}"
    model = f"{result.dataset['name']}, {result.choices['model']}"
    for runtime, report in result.safety.items():
        items = {item["name"].removeprefix("safety/"): item for item in report["items"]}
        metric = f"{result.primary_metric} {change_of(items.get('metric_drop'))}"
        by_verdict = {
            verdict: [name for name, item in items.items() if item["verdict"] == verdict]
            for verdict in ("FAIL", "INCONCLUSIVE")
        }
        flips, rarest = report["flips"], report["rarest_class"]
        yield [
            *(model, recipe, runtime, report["verdict"]),
            *(metric, change_of(items.get("ece_increase"))),
            f"{flips['changed']} of {flips['total']}" if flips else "-",
            rare_text(rarest["name"], report, result.dataset["class_names"]) if rarest else "-",
            ", ".join(by_verdict["FAIL"]).replace("_", " ") or "-",
            str(len(by_verdict["INCONCLUSIVE"])),
        ]


def change_of(item: dict[str, Any] | None) -> str:
    """A score before and after, and the interval of the loss; "-" where there is none."""
    if item is None or item["interval"] is None:
        return "-"
    low, high = (number(end) for end in item["interval"])
    return f"{number(item['baseline'])} to {number(item['compressed'])} ({low} to {high})"


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CHOSEN))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outputs", type=Path, default=Path("outputs/safety_gate"))
    parser.add_argument("--only-table", action="store_true", help="of the jobs that are done")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    codes = [
        run_job(words)
        for case in (() if arguments.only_table else arguments.cases)
        for words in commands(case, arguments)
    ]
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for case in arguments.cases:
        paths = sorted((arguments.outputs / case).rglob(FILE_NAME))
        rows = sorted(row for path in paths for row in rows_of(read_result(path)))
        lines += [f"| {' | '.join(row)} |" for row in rows]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text)
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
