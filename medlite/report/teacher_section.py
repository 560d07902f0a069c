"""What the teacher of a distilled model can do itself, beside its student."""

from __future__ import annotations

from html import escape

from medlite.metrics.names import class_keys
from medlite.report import tables
from medlite.report.blind_spots import find_blind_spots
from medlite.report.lookup import Lookup
from medlite.report.result import RunResult

REMEDY = (
    "Distillation can pass a blind spot on; compression.distill.class_weights=balanced makes the "
    "teacher's word on rare classes count for more."
)


def teacher_section(result: RunResult, found: Lookup) -> str:
    """Metrics, calibration and the sensitivity of each class; "" for runs without a teacher."""
    if not result.teacher:
        return ""
    names = result.dataset["class_names"]
    scores = {score: score for score in (result.primary_metric, "ece", "nll")}
    scores |= {
        f"sensitivity/{key}": f"sensitivity, {name}"
        for name, key in zip(names, class_keys(names), strict=True)
    }
    rows = [
        [
            escape(label),
            *(
                tables.figure(found.get(f"{prefix}test/{score}"), digits_only=True)
                for prefix in ("teacher/", "baseline/", "")
            ),
        ]
        for score, label in scores.items()
    ]
    headings = ["in torch", "teacher", "student's baseline", "student, deployed"]
    spots = find_blind_spots(found, names)
    items = "".join(f"<li>{escape(str(spot))}.</li>" for spot in spots)
    told = f"<ul>{items}</ul><p>{escape(REMEDY)}</p>" if spots else ""
    of_teacher = result.teacher
    who = (
        f"<b>{escape(of_teacher['name'])}</b>, {of_teacher['params']:,} parameters, "
        f"{of_teacher['macs'] / 1e9:.3g} GMACs, sha256 <code>{of_teacher['sha256'][:12]}</code>"
    )
    return f"<p>{who}</p>{tables.table(headings, rows)}{told}"
