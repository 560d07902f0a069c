"""report.html: one file that a browser opens anywhere, without scripts or network."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from medlite.report import figures, tables
from medlite.report.cases_section import exemplar_section, failure_section
from medlite.report.examples import Examples, read_examples
from medlite.report.explanation_section import explanation_section
from medlite.report.frame import page
from medlite.report.gallery import gallery
from medlite.report.lineage import (
    class_lineage_table,
    gains_table,
    lineage_diagram,
    lineage_table,
)
from medlite.report.lookup import Lookup
from medlite.report.result import RunResult, write_atomically
from medlite.report.robustness_section import robustness_section
from medlite.report.shortcut_section import shortcut_section
from medlite.report.teacher_section import teacher_section
from medlite.report.verdict import worst_budget


def write_report_html(result: RunResult, examples: Path | None, path: Path) -> None:
    """Write the report of one run.

    Args:
        result: the run.
        examples: npz of `examples.write_examples`; None leaves the pictures out.
        path: the file to write; pictures of single cases are looked for beside it.

    Raises:
        RecordError: `examples` cannot be read or `path` cannot be written.
    """
    pictures = None if examples is None else read_examples(examples)
    found = Lookup(result.measurements)
    sections = [
        ("Results at a glance", tables.glance_table(result, found)),
        ("Example predictions", example_section(result, pictures)),
        ("Classes", tables.class_table(result, found)),
        ("Latency", latency_section(result)),
        ("Calibration", calibration_section(result)),
        ("Teacher", teacher_section(result, found)),
        ("Safety: compressed against uncompressed", safety_section(result)),
        ("Control: against as much further training in float", control_section(result)),
        ("Robustness: both models on worse images", robustness_section(result.robustness)),
        ("Shortcuts: what is told without the finding", shortcut_section(result.shortcuts)),
        (
            "Explainability: what decisions rest on",
            explanation_section(result.explanations, path.parent),
        ),
        ("Images that compression changed", exemplar_section(result, path.parent)),
        ("Failure modes", failure_section(result, path.parent)),
        ("Budgets", budget_section(result)),
        ("Deployment card", tables.card_html(result.card)),
        ("Training", training_section(result)),
        ("Parity with torch", tables.parity_table(result.parity) if result.parity else ""),
        ("Lineage", lineage_section(result)),
        ("Environment", tables.pairs_table(result.environment)),
    ]
    body = "".join(
        f"<section><h2>{escape(title)}</h2>{content}</section>"
        for title, content in sections
        if content
    )
    write_atomically(path, page(result.name, f"{header(result)}<main>{body}</main>"))


def header(result: RunResult) -> str:
    """Name, what was run, and the verdict."""
    choices = " &middot; ".join(
        f"{escape(group)} <b>{escape(option)}</b>" for group, option in result.choices.items()
    )
    written = escape(result.created_at[:16].replace("T", " "))
    verdict = result.verdict
    chips = {
        "budgets": worst_budget(verdict["budgets"]),
        "safety": verdict["safety"],
        "parity": verdict["parity"],
    }
    values = set(chips.values())
    is_unsure = values & {"INCONCLUSIVE", "unknown"}
    is_bad = bool(values & {"FAIL", "missed"} or verdict.get("unmeasured"))
    mood = "bad" if is_bad else "unsure" if is_unsure else "good"
    marks = "".join(
        f'<span class="mark">{escape(name)} {tables.chip(value)}</span>'
        for name, value in chips.items()
    )
    provenance = result.dataset["provenance"]
    caution = "" if provenance == "real" else f'<p class="caution">Data: {escape(provenance)}</p>'
    return (
        f'<header><p class="kind">medlite report</p><h1>{escape(result.name)}</h1>'
        f'<p class="muted">{choices} &middot; <span class="date">{written}</span></p>{caution}'
        f'<div class="verdict {mood}"><p>{escape(verdict["summary"])}</p><div>{marks}</div></div>'
        "</header>"
    )


def example_section(result: RunResult, examples: Examples | None) -> str:
    """Pictures, spread evenly over the test split."""
    if examples is None:
        return ""
    remark = '<p class="muted">Spread evenly over the test split; nobody chose them.</p>'
    return gallery(examples, result.dataset) + remark


def latency_section(result: RunResult) -> str:
    """Distribution and stability."""
    chart = figures.latency_chart(result.latency_samples_ms)
    if not chart:
        return ""
    disturbed = {
        candidate: text
        for candidate, text in {**result.stability, **result.failures}.items()
        if text != "stable"
    }
    items = [f"<li>{escape(name)}: {escape(text)}</li>" for name, text in disturbed.items()]
    notes = "".join(items) or "<li>Nothing disturbed the timing.</li>"
    remark = (
        "Each dot is one query; the band holds the middle half, the long mark is the median and "
        "the short one the 90th percentile of the samples."
    )
    return f'<div class="wide">{chart}</div><p class="muted">{remark}</p><ul>{notes}</ul>'


def calibration_section(result: RunResult) -> str:
    """A reliability diagram a runtime, before and after compression."""
    charts = []
    for runtime in [key for key in result.reliability if "/" not in key]:
        before = result.reliability.get(f"baseline/{runtime}")
        bins = {"before": before} if before else {}
        bins["after" if before else "model"] = result.reliability[runtime]
        chart = figures.reliability_chart(f"reliability on {runtime}", bins)
        charts.append(f"<figure>{chart}<figcaption>{escape(runtime)}</figcaption></figure>")
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def safety_section(result: RunResult) -> str:
    """The gate's items for each runtime."""
    failures = "".join(
        f"<h3>{escape(runtime)} {tables.chip('INCONCLUSIVE')}</h3>"
        f"<p>The deployed model could not be measured: {escape(result.failures[runtime])}</p>"
        for runtime in result.verdict.get("unmeasured", ())
    )
    nothing = '<p class="muted">There was no compressed model to compare.</p>'
    return gate_tables(result.safety) + failures or nothing


def control_section(result: RunResult) -> str:
    """The same items against the control; nothing where no step trained."""
    remark = (
        '<p class="muted">Before: the uncompressed model, fine-tuned as long as the steps train. '
        "What it gained too is not the merit of the compression.</p>"
    )
    tables_of_runtimes = gate_tables(result.control)
    return tables_of_runtimes and tables_of_runtimes + remark


def gate_tables(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """A table a runtime."""
    return "".join(
        f"<h3>{escape(runtime)} {tables.chip(report['verdict'])}</h3>"
        f'{tables.safety_table(report)}<p class="muted">{tables.safety_remark(report)}</p>'
        f"{tables.class_intervals_table(report)}{tables.operating_points_table(report)}"
        for runtime, report in reports.items()
    )


def budget_section(result: RunResult) -> str:
    """The hardware profile's limits."""
    budgets = result.verdict["budgets"]
    if not budgets:
        return '<p class="muted">The hardware profile sets no budget.</p>'
    return tables.budget_table(budgets)


def training_section(result: RunResult) -> str:
    """Curves of every fit."""
    parts = []
    for name, rows in result.history.items():
        charts = figures.training_charts(rows, result.primary_metric)
        pictures = "".join(f"<figure>{chart}</figure>" for chart in charts)
        parts.append(f'<h3>{escape(name)}</h3><div class="charts">{pictures}</div>')
    return "".join(parts)


def lineage_section(result: RunResult) -> str:
    """What was done, and what came out."""
    stages = tables.stages_table(result.stages)
    if result.lineage:
        picture = lineage_diagram(result.lineage, result.primary_metric)
        table = lineage_table(result.lineage, result.primary_metric)
        gains = gains_table(result.lineage)
        table += f"<h3>What each step brought</h3>{gains}" if gains else ""
        classes = class_lineage_table(result.lineage)
        stages = (
            f'<div class="wide">{picture}</div>{table}<h3>Sensitivity of each class</h3>{classes}'
            f"<h3>Stages of this run</h3>{stages}"
        )
    if not result.artifacts:
        return stages
    return f"{stages}<h3>Exported models</h3>{tables.artifacts_table(result.artifacts)}"
