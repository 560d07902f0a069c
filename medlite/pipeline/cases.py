"""Part of stage `report`: the images that compression changed or that fail, with their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from medlite.metrics.decisions import decisions
from medlite.pipeline.job import Job
from medlite.report.examples import write_examples
from medlite.report.gallery import named
from medlite.safety.exemplars import find_exemplars
from medlite.safety.failures import find_failures
from medlite.safety.image_quality import measure_quality
from medlite.types import DataSpec, Predictions

NUM_PICTURES = 6

Reports = dict[str, dict[str, Any]]
"""runtime -> report as plain values"""


def record_exemplars(
    job: Job, uncompressed: Predictions | None, predictions: Mapping[str, Predictions]
) -> Reports:
    """`ExemplarReport` of each runtime, with what is true of each image and what both models say.

    The uncompressed model is that of the safety gate; empty where there is none.
    """
    reports: Reports = {}
    for runtime, said in _deployed(predictions).items():
        if uncompressed is None:
            continue
        found = find_exemplars(uncompressed, said, job.spec)
        if found is None:
            continue
        plain = found.to_json()
        sides = {"uncompressed": uncompressed, runtime: said}
        plain["exemplars"] = [_told(case, sides, job.spec) for case in plain["exemplars"]]
        plain["pictures"] = _write_pictures(job, f"exemplars-{runtime}", plain["exemplars"], sides)
        reports[runtime] = plain
    return reports


def record_failures(
    job: Job, uncompressed: Predictions | None, predictions: Mapping[str, Predictions]
) -> Reports:
    """`FailureReport` of each runtime, its cases told as those of `record_exemplars`."""
    reports: Reports = {}
    samples = job.data.data.test.samples
    qualities = measure_quality(samples[position][0] for position in range(len(samples)))
    for runtime, said in _deployed(predictions).items():
        found = find_failures(
            uncompressed,
            said,
            job.spec,
            qualities=qualities,
            sources=job.data.data.test.sources,
            num_resamples=job.config.safety.num_resamples,
            seed=job.config.seed,
        )
        if found is None:
            continue
        plain = found.to_json()
        sides = {} if uncompressed is None else {"uncompressed": uncompressed}
        sides |= {runtime: said}
        for kind in ("worst", "changed"):
            plain[kind] = [_told(case, sides, job.spec) for case in plain[kind]]
            pictures = _write_pictures(job, f"failures-{kind}-{runtime}", plain[kind], sides)
            plain[f"{kind}_pictures"] = pictures
        reports[runtime] = plain
    return reports


def _deployed(predictions: Mapping[str, Predictions]) -> dict[str, Predictions]:
    return {key: said for key, said in predictions.items() if "/" not in key}


def _told(
    case: Mapping[str, Any], sides: Mapping[str, Predictions], spec: DataSpec
) -> dict[str, Any]:
    """A case with the truth and every decision in words."""
    position = case["position"]
    any_side = next(iter(sides.values()))
    decided = {
        name: decisions(torch.from_numpy(said.logits[position : position + 1]), spec.labels)[0]
        for name, said in sides.items()
    }
    said = {name: _in_words(choice.numpy(), spec) for name, choice in decided.items()}
    return {**case, "truth": _in_words(any_side.targets[position], spec), "decisions": said}


def _in_words(decided: np.ndarray, spec: DataSpec) -> str:
    """The class or classes of an image; of a mask, the size of each foreground class."""
    if spec.task == "classification":
        return named(decided, spec.class_names, spec.labels)
    sizes = np.bincount(decided.ravel(), minlength=len(spec.class_names))[1:]
    return (
        ", ".join(
            f"{name} {size:,} px"
            for name, size in zip(spec.class_names[1:], sizes, strict=True)
            if size
        )
        or "nothing"
    )


def _write_pictures(
    job: Job, stem: str, cases: Sequence[Mapping[str, Any]], sides: Mapping[str, Predictions]
) -> str | None:
    """The first few cases as an npz in the run directory; its name."""
    positions = [case["position"] for case in cases[:NUM_PICTURES]]
    path = job.config.directory / f"{stem}.npz"
    path.unlink(missing_ok=True)
    if not positions:
        return None
    samples = job.data.data.test.samples
    any_side = next(iter(sides.values()))
    write_examples(
        path,
        images=np.stack([samples[position][0] for position in positions]),
        targets=any_side.targets[positions],
        logits={name: said.logits[positions] for name, said in sides.items()},
    )
    return path.name
