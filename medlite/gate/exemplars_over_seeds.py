"""Pruning-identified exemplars of several seeds: the scores of both models averaged over them.

As Holste et al., MICCAI 2023 (arXiv:2308.09180), find them; see `medlite.safety.exemplars`. What
one seed's noise changes is averaged away, what compression changes is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medlite.errors import RecordError
from medlite.gate.recorded import load_run
from medlite.gate.sides import Side, match
from medlite.report.cases_section import NUM_ROWS, odds_words
from medlite.report.forgettability import strengths_of
from medlite.report.lookup import number
from medlite.report.result import RunResult
from medlite.report.sameness import settings_digest
from medlite.report.section import Section
from medlite.safety.exemplars import (
    RULES,
    ExemplarReport,
    Representation,
    average_predictions,
    find_exemplars,
)

HEADINGS = ("class", "exemplars", "others", "odds ratio (95 %)", "p (Fisher, Holm)")


@dataclass(frozen=True, kw_only=True)
class SeedExemplars:
    """The exemplars of one model and recipe on one runtime.

    report: None where fewer than two seeds saw the same test images.
    left_out: what is wrong with the others.
    """

    name: str
    seeds: tuple[int, ...]
    report: ExemplarReport | None
    left_out: tuple[str, ...]


def exemplars_over_seeds(results: Mapping[Path, RunResult]) -> list[SeedExemplars]:
    """One for each recipe and runtime that was compared with its baseline on several seeds."""
    groups: dict[tuple[str, ...], dict[int, Path]] = defaultdict(dict)
    for directory, result in results.items():
        choices = [result.choices.get(each, "") for each in ("model", "compression")]
        for runtime in result.safety:
            strengths = strengths_of(result, runtime)
            words = [result.dataset["name"], *choices]
            words += [f"{key} {strength:g}" for key, strength, _ in strengths]
            key = (settings_digest(result, runtime), *words, runtime)
            groups[key][result.config.get("seed", 0)] = directory
    return [
        _of_seeds(dict(sorted(runs.items())), f"{', '.join(words)} on {runtime}", runtime)
        for (_, *words, runtime), runs in groups.items()
        if len(runs) > 1
    ]


def exemplar_sections(results: Mapping[Path, RunResult]) -> list[Section]:
    """`exemplars_over_seeds` as parts of the comparison."""
    return [_section(found) for found in exemplars_over_seeds(results)]


def _of_seeds(runs: Mapping[int, Path], name: str, runtime: str) -> SeedExemplars:
    sides: dict[int, tuple[Side, Side]] = {}
    left_out = []
    for seed, directory in runs.items():
        try:
            pair = load_run(directory, f"baseline/{runtime}"), load_run(directory, runtime)
            _refuse_infinite(pair)
            if sides:
                match(next(iter(sides.values()))[0], pair[0])
        except RecordError as error:
            left_out.append(f"Seed {seed} is left out: {error}")
        else:
            sides[seed] = pair
    report = None
    if len(sides) > 1:
        spec = next(iter(sides.values()))[0].spec
        baseline, compressed = (
            average_predictions([pair[position].predictions for pair in sides.values()], spec)
            for position in (0, 1)
        )
        report = find_exemplars(baseline, compressed, spec)
    return SeedExemplars(name=name, seeds=tuple(sides), report=report, left_out=tuple(left_out))


def _refuse_infinite(pair: tuple[Side, Side]) -> None:
    for side in pair:
        if not np.isfinite(side.predictions.logits).all():
            message = f"{side.name} has outputs that are not finite, which have no mean"
            raise RecordError(message)


def _section(found: SeedExemplars) -> Section:
    title = f"Images that compression changed, over seeds: {found.name}"
    report = found.report
    if report is None:
        alone = "Fewer than two seeds saw the same test images: no scores to average."
        return Section(title=title, remarks=(*found.left_out, alone))
    seeds = ", ".join(map(str, found.seeds))
    counted = (
        f"{len(report.exemplars)} of {report.num_images} test images: at most the 5 % with the "
        f"largest disagreement ({RULES[report.rule]}) between the scores of the uncompressed and "
        f"the compressed models, each averaged over the seeds {seeds}."
    )
    return Section(
        title=title,
        headings=HEADINGS,
        rows=tuple(_row(each, len(report.exemplars)) for each in report.classes),
        remarks=tuple(filter(None, (counted, _positions(report), *found.left_out))),
    )


def _positions(report: ExemplarReport) -> str:
    """Places in the test split, the most different first; "" of no exemplars."""
    shown = ", ".join(str(each.position) for each in report.exemplars[:NUM_ROWS])
    num_others = len(report.exemplars) - NUM_ROWS
    more = f" and {num_others} more" if num_others > 0 else ""
    return f"Places in the test split, the most changed first: {shown}{more}." if shown else ""


def _row(each: Representation, num_exemplars: int) -> tuple[str, ...]:
    return (
        each.class_name,
        f"{each.num_exemplars} of {num_exemplars}",
        str(each.num_others),
        odds_words({"odds_ratio": each.odds_ratio, "interval": each.interval}),
        number(each.p_value),
    )
