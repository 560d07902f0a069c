"""The report's tables, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from medlite.metrics.names import class_keys
from medlite.report.lookup import Lookup, interval, number, quantity
from medlite.report.result import CardCategory, RunResult
from medlite.types import Measurement

Cell = str
"""HTML, already escaped"""

CHIP_COLOURS = {
    "FAIL": "fail",
    "missed": "fail",
    "INCONCLUSIVE": "open",
    "unknown": "open",
    "SUSPECT": "open",
    "no gain": "open",
    "PASS": "pass",
    "fits": "pass",
}
"""the worst first, as several seeds have several verdicts"""


def plain(value: Any) -> Cell:
    """Any value as a cell; numbers to three digits, nothing as a dash."""
    if value is None or value == "":
        return '<span class="muted">-</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int):
        return f"{value:,}"
    return escape(str(value))


def chip(verdict: str) -> Cell:
    """A verdict, or a count of several ("1 FAIL, 2 PASS"), in the colour of the worst."""
    colour = next((each for word, each in CHIP_COLOURS.items() if word in verdict), "quiet")
    return f'<span class="chip {colour}">{escape(verdict)}</span>'


def remark(text: str) -> Cell:
    """Small words below a value."""
    return f'<span class="spread">{escape(text)}</span>' if text else ""


def figure(measurement: Measurement | None, digits_only: bool = False) -> Cell:
    """A value with its interval below it; the note shows on hovering."""
    if measurement is None:
        return plain(None)
    if measurement.value is None:
        return f'<span class="muted" title="{escape(measurement.note)}">unavailable</span>'
    value = number(measurement.value) if digits_only else quantity(measurement)
    below = remark(interval(measurement))
    return f'<span title="{escape(measurement.note)}">{escape(value)}</span>{below}'


def table(headings: Sequence[str], rows: Iterable[Sequence[Cell]], *, num_words: int = 1) -> str:
    """A table whose first `num_words` columns are words and the others numbers."""
    kinds = ["words" if column < num_words else "" for column in range(len(headings))]
    head = "".join(
        f'<th class="{k}">{escape(h)}</th>' for h, k in zip(headings, kinds, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{k}">{cell}</td>' for cell, k in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def glance_table(result: RunResult, found: Lookup) -> str:
    """One row a candidate with what decides."""
    metric = result.primary_metric
    headings = [
        "", metric, "ECE", "p50 ms", "p90 ms", "images/s", "speed-up", "size KiB",
        "peak MiB", "mJ/image",
    ]  # fmt: skip
    rows = []
    for candidate in found.candidates():
        scores = [found.score(name, candidate) for name in (metric, "ece")]
        speedup = found.get(f"speedup/{candidate}/ratio")
        figures = [
            found.of("latency", candidate, "p50_ms"),
            found.of("latency", candidate, "p90_ms"),
            found.of("throughput", candidate, "images_per_s"),
            speedup,
            found.of("size", candidate, "disk_kib"),
            found.of("memory", candidate, "peak_mib"),
            found.of("energy", candidate, "net_mj_per_image"),
        ]
        cells = [figure(each, digits_only=True) for each in (*scores, *figures)]
        rows.append([label_of(candidate), *cells])
    return table(headings, rows)


def label_of(candidate: str) -> Cell:
    """A candidate in words."""
    if candidate.startswith("baseline/"):
        return f'{escape(candidate.removeprefix("baseline/"))} <span class="muted">baseline</span>'
    return f"<b>{escape(candidate)}</b>"


def class_table(result: RunResult, found: Lookup) -> str:
    """Per class: how many, and its scores on each runtime, before and after compression."""
    names, counts = result.dataset["class_names"], result.dataset["class_counts"]
    is_segmentation = result.dataset["task"] == "segmentation"
    scores = ("sensitivity", "dice" if is_segmentation else "auc")
    columns = [(score, runtime) for score in scores for runtime in found.runtimes()]
    headings = ["class", "training " + ("pixels" if is_segmentation else "images")]
    headings += [f"{score}, {runtime}" for score, runtime in columns]
    rows = [
        [
            escape(name),
            plain(count),
            *(before_and_after(found, f"{score}/{key}", runtime) for score, runtime in columns),
        ]
        for name, key, count in zip(names, class_keys(names), counts, strict=True)
    ]
    return table(headings, rows)


def before_and_after(found: Lookup, score: str, runtime: str) -> Cell:
    """The deployed model's score with its interval, behind that of the baseline if there is one."""
    before, after = found.score(score, f"baseline/{runtime}"), found.score(score, runtime)
    if before is None or before.value is None:
        return figure(after, digits_only=True)
    arrow = f'<span class="muted">{number(before.value)} &rarr;</span> '
    return arrow + figure(after, digits_only=True)


def safety_table(report: Mapping[str, Any]) -> str:
    """One row a judged loss, then one a loss without a margin."""
    headings = ["item", "verdict", "before", "after", "loss", "95 % interval", "margin"]
    judged = [(item, chip(item["verdict"]), item["margin"]) for item in report["items"]]
    shown = [(item, chip("shown"), None) for item in report.get("shown", ())]
    rows = [
        [
            escape(item["name"].removeprefix("safety/").replace("_", " ")),
            mark + remark(safety_note(item)),
            plain(item["baseline"]),
            plain(item["compressed"]),
            plain(item["difference"]),
            plain(item["interval"] and " to ".join(number(end) for end in item["interval"])),
            plain(margin and f"{margin:g}"),
        ]
        for item, mark, margin in (*judged, *shown)
    ]
    return table(headings, rows, num_words=2)


def safety_note(item: Mapping[str, Any]) -> str:
    """What is said about a loss, with the p value that it has."""
    p_value = item.get("p_value")
    test = "" if p_value is None else f"DeLong p = {number(p_value)} (Holm)"
    return "; ".join(filter(None, (item["note"], test)))


def class_intervals_table(report: Mapping[str, Any]) -> str:
    """What so few patients can tell of each class's sensitivity; "" where it is not known."""
    classes = report.get("class_intervals", ())
    if not classes:
        return ""
    headings = ["class", f"{report['group_kind']}s"]
    for side in ("before", "after"):
        headings += [f"sensitivity {side}", "Wilson 95 %", "Clopper-Pearson 95 %"]
    rows = []
    for row in classes:
        cells = [escape(row["name"]), plain(row["num_groups"])]
        for side in ("baseline", "compressed"):
            ends = [row[f"{side}_{kind}"] for kind in ("wilson", "exact")]
            shown = [" to ".join(number(end) for end in pair) for pair in ends]
            cells += [plain(float(row[side])), *map(plain, shown)]
        rows.append(cells)
    return table(headings, rows)


def operating_points_table(report: Mapping[str, Any]) -> str:
    """Where the uncompressed model calls each class; "" where nothing was chosen."""
    points = report.get("operating_points", ())
    if not points:
        return ""
    headings = ["class", "called from probability", "validation images", "sensitivity there"]
    headings += ["specificity there"]
    rows = [
        [
            escape(point["class_name"]),
            plain(point["threshold"]),
            plain(point["num_positives"]),
            plain(point["sensitivity"]),
            plain(point["specificity"]),
        ]
        for point in points
    ]
    return table(headings, rows)


def safety_remark(report: Mapping[str, Any]) -> str:
    """Flips, rarest class and how it was resampled, in a sentence."""
    parts = [
        f"{report['num_groups']} {report['group_kind']}s resampled "
        f"{report['num_resamples']:,} times, both models on the same resample"
    ]
    flips, rarest = report.get("flips"), report.get("rarest_class")
    if flips:
        p_value = flips["mcnemar_p"]
        test = "" if p_value is None else f" (McNemar p = {number(p_value)})"
        parts.append(
            f"{flips['changed']:,} of {flips['total']:,} {flips['unit']} changed their decision: "
            f"{flips['broken']:,} broken, {flips['mended']:,} mended{test}"
        )
    if rarest:
        parts.append(f"rarest class: {rarest['name']}, {rarest['test_count']} test images")
    rare = [f"{c['name']} ({c['prevalence']:.1%})" for c in report.get("rare_classes", ())]
    if rare:
        parts.append(f"rare in training: {', '.join(rare)}")
    return escape(". ".join(part[:1].upper() + part[1:] for part in parts) + ".")


def budget_table(budgets: Sequence[Mapping[str, Any]]) -> str:
    """One row a budget and runtime."""
    rows = [
        [
            escape(row["name"].removeprefix("max_").replace("_", " ")),
            escape(row["runtime"]),
            chip(row["verdict"]) + remark(row["margin"]),
            plain(row["value"]),
            plain(row["limit"] and f"{row['limit']:g}"),
            escape(row["unit"]),
        ]
        for row in budgets
    ]
    headings = ["budget", "runtime", "verdict", "measured", "limit", "unit"]
    return table(headings, rows, num_words=3)


def parity_table(parity: Sequence[Mapping[str, Any]]) -> str:
    """How far each exported model is from the torch model that it was made of."""
    headings = ["candidate", "verdict", "images", "largest difference", "relative", "cosine"]
    headings += ["changed decisions", "Dice between masks"]
    rows = []
    for row in parity:
        why = [*row.get("reasons", ()), row.get("first_divergence", "")]
        rows.append(
            [
                label_of(row["candidate"]),
                chip("PASS" if row["passed"] else "FAIL") + remark("; ".join(filter(None, why))),
                plain(row["num_images"]),
                plain(row["max_abs_difference"]),
                plain(row["max_relative_difference"]),
                f"{row['cosine']:.6f}",
                f"{row['num_flips']:,} of {row['num_decisions']:,}",
                "-" if row["dice"] is None else f"{row['dice']:.4f}",
            ]
        )
    return table(headings, rows, num_words=2)


def stages_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """What was done, the key under which it is kept, and how long it took."""
    rows = [[escape(s["name"]), plain(s.get("key")), plain(s["seconds"])] for s in stages]
    return table(["stage", "key", "seconds"], rows, num_words=2)


def artifacts_table(artifacts: Sequence[Mapping[str, Any]]) -> str:
    """The exported models."""
    headings = ["model", "file", "format", "precision", "sha256", "KiB"]
    rows = [
        [
            escape(artifact["candidate"] or "deployed"),
            escape(artifact["path"]),
            escape(artifact["format"]),
            escape(artifact["precision"]),
            f"<code>{artifact['sha256'][:16]}</code>",
            plain(artifact["num_bytes"] / 1024),
        ]
        for artifact in artifacts
    ]
    return table(headings, rows, num_words=5)


def pairs_table(pairs: Mapping[str, Any]) -> str:
    """Names and values; nested mappings on one line."""
    rows = []
    for name, value in pairs.items():
        text = value
        if isinstance(value, Mapping):
            text = ", ".join(f"{key} {item}" for key, item in value.items())
        rows.append(
            [escape(name.replace("_", " ")), plain(str(text) if text is not None else None)]
        )
    return table(["", ""], rows, num_words=2).replace("<thead>", '<thead class="none">')


def card_html(card: Sequence[CardCategory]) -> str:
    """The nine categories as blocks of label, value and provenance."""
    blocks = []
    for category in card:
        rows = "".join(
            f"<tr><th>{escape(row.label)}</th><td>{escape(row.value)}"
            f"{remark(row.note)}"
            f'</td><td><span class="tag {row.provenance}">{row.provenance}</span></td></tr>'
            for row in category.fields
        )
        blocks.append(
            f'<div class="block"><h3>{escape(category.title)}</h3><table>{rows}</table></div>'
        )
    return f'<div class="card">{"".join(blocks)}</div>'
