"""`medlite gate A B`: is B as safe as A? Runs or files of predictions, matched by id."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from medlite.command_line import conf_directory
from medlite.config import margins_config
from medlite.errors import EXIT_UNSAFE
from medlite.gate.output import as_html, as_table
from medlite.gate.prediction_files import load_file
from medlite.gate.recorded import candidates_of, load_run
from medlite.gate.sides import Side, match
from medlite.report.result import FILE_NAME, without_nan, write_atomically
from medlite.report.terminal import console
from medlite.safety.gate import compare_models


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two models, and print and write what was found.

    Returns:
        0, or 3 under --enforce if the verdict is FAIL (INCONCLUSIVE is no proof of harm).

    Raises:
        MedliteError: something cannot be read, or the two are not about the same samples.
    """
    options = _parse(argv)
    margins = margins_config(options.safety, [conf_directory()])
    first, second = load_sides(options.baseline, options.compressed)
    report = compare_models(
        first.predictions,
        match(first, second),
        first.spec,
        margins,
        operating_points=first.operating_points,
        seed=options.seed,
    )
    stated = {name: value for name, value in asdict(margins).items() if name != "enforce"}
    plain = without_nan(
        {
            "baseline": first.name,
            "compressed": second.name,
            "safety": options.safety,
            "margins": stated,
            "report": report.to_json(),
        }
    )
    title = f"{second.name} against {first.name}, safety={options.safety}: {report.verdict}"
    console().print(as_table(plain["report"], title))
    if options.json is not None:
        write_atomically(options.json, json.dumps(plain, indent=1, allow_nan=False))
    if options.html is not None:
        write_atomically(options.html, as_html(plain))
    return EXIT_UNSAFE if options.enforce and report.verdict == "FAIL" else 0


def load_sides(baseline: str, compressed: str) -> tuple[Side, Side]:
    """Both sides; runs without a named candidate are compared on the first runtime they share.

    Raises:
        MedliteError: see `load_run` and `load_file`.
    """
    sources = [split_source(word) for word in (baseline, compressed)]
    unnamed = [candidates_of(path) for path, name in sources if name is None and is_run(path)]
    shared = (
        [name for name in unnamed[0] if all(name in each for each in unnamed)] if unnamed else []
    )
    sides = []
    for path, name in sources:
        if not is_run(path):
            sides.append(load_file(path))
            continue
        candidate = name or (shared or candidates_of(path))[0]
        sides.append(load_run(path, candidate))
    return sides[0], sides[1]


def split_source(word: str) -> tuple[Path, str | None]:
    """`RUN@CANDIDATE` -> both; result.json stands for its directory."""
    path, name = Path(word), None
    if not path.exists() and "@" in word:
        before, _, name = word.rpartition("@")
        path = Path(before)
    return (path.parent if path.name == FILE_NAME else path), name


def is_run(path: Path) -> bool:
    """Whether it is a run directory and not a file of predictions."""
    return path.is_dir()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="medlite gate",
        description="Is the second model as safe as the first? docs/gate.md describes the files.",
    )
    source = "a run directory, RUN@CANDIDATE (such as RUN@baseline/onnxruntime), or a file"
    parser.add_argument("baseline", help=source)
    parser.add_argument("compressed", help="likewise, on the same samples")
    parser.add_argument(
        "--safety", default="default", help="margins: an option of safety=, or a yaml"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--html", type=Path, help="write a page there")
    parser.add_argument("--enforce", action="store_true", help="exit with 3 if the verdict is FAIL")
    return parser.parse_args(argv)
