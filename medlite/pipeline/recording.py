"""Stage `report`: judge on the runtimes' own output, write the record, show it everywhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import chain, starmap
from typing import Any

import numpy as np
import torch

from medlite.bench.benchmark import BenchmarkResult
from medlite.bench.budget import judge_budgets
from medlite.bench.complexity import measure_complexity, write_layers
from medlite.export.layer_costs import count_layers
from medlite.metrics.evaluate import evaluate, reliability
from medlite.metrics.task import primary_metric
from medlite.pipeline.cases import record_exemplars, record_failures
from medlite.pipeline.job import Job
from medlite.pipeline.lineage import describe_teacher, trace_lineage
from medlite.pipeline.loggers import Sinks
from medlite.pipeline.measuring import Artifacts, keep_targets, predict, split_key
from medlite.pipeline.parity import Exported, compare_with_torch
from medlite.pipeline.teachers import file_marks
from medlite.pipeline.training import Trained
from medlite.report.blind_spots import find_blind_spots
from medlite.report.card import build_card, write_card_markdown
from medlite.report.environment import describe_environment
from medlite.report.examples import choose_examples, write_examples
from medlite.report.explanation_section import explanation_measurements
from medlite.report.gains import Gains, describe_gain, gains_of
from medlite.report.lookup import Lookup
from medlite.report.page import write_report_html
from medlite.report.result import RunResult, write_result
from medlite.report.terminal import console, print_summary
from medlite.report.verdict import (
    describe_arithmetic,
    summarise_verdict,
    worst_of,
)
from medlite.report.wandb_sink import log_to_wandb
from medlite.safety.gate import SafetyReport, compare_models
from medlite.safety.operating_point import OperatingPoint, choose_operating_points
from medlite.safety.robustness import robustness_measurements
from medlite.safety.shortcuts import shortcut_measurements
from medlite.types import Measurement, Predictions

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the earlier stages left."""

    deployed: Trained
    baseline: Trained
    steps: Mapping[str, Trained]
    """what each step left; the last is the deployed one"""
    control: Trained | None
    artifacts: Artifacts
    bench: BenchmarkResult
    gains: Mapping[str, Gains]
    """step -> what it brought on each runtime"""
    robustness: Mapping[str, dict[str, Any]]
    """runtime -> `RobustnessReport.to_json`"""
    shortcuts: Mapping[str, dict[str, Any]]
    """runtime -> `ShortcutReport.to_json`"""
    explanations: Mapping[str, Any]
    seconds: Mapping[str, float]

    @property
    def teacher(self) -> Trained | None:
        """Of whom a step learned, if that one's classes are the job's."""
        taught = (each.teacher for each in self.steps.values() if each.teacher is not None)
        return next(taught, None)

    @property
    def nets(self) -> dict[str, torch.nn.Module]:
        """Candidate -> net, the deployed one first."""
        nets = {"": self.deployed.net}
        return nets | ({"baseline": self.baseline.net} if "baseline" in self.artifacts else {})


def record(job: Job, evidence: Evidence) -> RunResult:
    """Judge everything and gather it into the truth of the run."""
    torch_says = {name: predict(job, net) for name, net in evidence.nets.items()}
    keep_targets(job, torch_says[""])
    predictions = _on_runtimes(torch_says[""], evidence.bench)
    exported = Exported(
        job=job, nets=evidence.nets, artifacts=evidence.artifacts, torch_says=torch_says
    )
    parity = compare_with_torch(exported, predictions)
    points = {name: _operating_points(job, net) for name, net in evidence.nets.items()}
    safety = _judge_safety(job, torch_says.get("baseline"), predictions, points.get("baseline"))
    control_points = None
    if evidence.control is not None:
        torch_says["control"] = predict(job, evidence.control.net)
        control_points = _operating_points(job, evidence.control.net)
    control = _judge_safety(job, torch_says.get("control"), predictions, control_points)
    if evidence.teacher is not None:
        torch_says["teacher"] = predict(job, evidence.teacher.net)
    known = {net: torch_says[name] for name, net in evidence.nets.items()}
    measurements = [
        *evidence.bench.measurements,
        *_evaluate(job, torch_says, predictions),
        *_count(job, evidence),
        *chain.from_iterable(starmap(robustness_measurements, evidence.robustness.items())),
        *chain.from_iterable(starmap(shortcut_measurements, evidence.shortcuts.items())),
        *explanation_measurements(evidence.explanations),
    ]
    verdict = _verdict(job, evidence, measurements, parity, safety=safety)
    config, histories = job.config, evidence.deployed.history.items()
    result = RunResult(
        name=config.name,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        choices=dict(config.choices),
        primary_metric=primary_metric(job.spec),
        dataset=asdict(job.spec),
        config=config.resolved,
        environment=describe_environment(config.seed),
        measurements=measurements,
        stages=_stages(evidence),
        lineage=[
            {**row, "gains": evidence.gains.get(row["stage"], {})}
            for row in trace_lineage(job, {"train": evidence.baseline, **evidence.steps}, known)
        ],
        learned_from=list(file_marks(config)),
        teacher=_describe_teacher(job, evidence.teacher, torch_says.get("teacher"), measurements),
        verdict=verdict,
        artifacts=list(_artifacts(job, evidence)),
        parity=parity,
        safety={runtime: report.to_json() for runtime, report in safety.items()},
        operating_points={
            name or "deployed": [asdict(point) for point in of_net]
            for name, of_net in points.items()
        },
        robustness=dict(evidence.robustness),
        shortcuts=dict(evidence.shortcuts),
        explanations=dict(evidence.explanations),
        exemplars=record_exemplars(job, torch_says.get("baseline"), predictions),
        failure_modes=record_failures(job, torch_says.get("baseline"), predictions),
        control={runtime: report.to_json() for runtime, report in control.items()},
        history={name: [dict(row) for row in rows] for name, rows in histories},
        latency_samples_ms=evidence.bench.samples_ms,
        reliability={key: reliability(said, job.spec) for key, said in predictions.items()},
        engines=evidence.bench.engines,
        operators=evidence.bench.operators,
        stability=evidence.bench.stability,
        failures=evidence.bench.failures,
        notes=dict(evidence.deployed.notes),
        examples=_write_examples(job, predictions),
        num_skipped=job.spec.num_skipped,
    )
    result.card = build_card(result)
    return result


def publish(job: Job, result: RunResult, sinks: Sinks) -> None:
    """Write result.json, the card and the page; send them to W&B; print the verdict."""
    directory = job.config.directory
    path = write_result(result, directory)
    write_card_markdown(result, directory / "card.md")
    write_report_html(result, directory / "examples.npz", directory / "report.html")
    if sinks.wandb_run is not None:
        keys = [row["key"] for row in result.lineage]
        weights = {key: job.store.weights_file(key) for key in keys}
        log_to_wandb(sinks.wandb_run, result, directory, weights)
    print_summary(result, console())
    _log.info("record: %s", path)
    _log.info("report: %s", directory / "report.html")


def _on_runtimes(reference: Predictions, bench: BenchmarkResult) -> dict[str, Predictions]:
    """Candidate's key -> what its runtime said about the same samples."""
    return {
        key: Predictions(logits=logits, targets=reference.targets, groups=reference.groups)
        for key, logits in bench.predictions.items()
    }


def _operating_points(job: Job, net: torch.nn.Module) -> tuple[OperatingPoint, ...]:
    """Of a classifier; nothing is computed for other nets."""
    if job.spec.task == "segmentation":
        return ()
    sensitivity = job.config.safety.operating_sensitivity
    return choose_operating_points(predict(job, net, "val"), job.spec, sensitivity=sensitivity)


def _judge_safety(
    job: Job,
    uncompressed: Predictions | None,
    predictions: Mapping[str, Predictions],
    points: tuple[OperatingPoint, ...] | None,
) -> dict[str, SafetyReport]:
    """The deployed model on each runtime against an uncompressed one in torch."""
    if uncompressed is None:
        return {}
    return {
        key: compare_models(
            uncompressed,
            said,
            job.spec,
            job.config.safety,
            operating_points=points or (),
            seed=job.config.seed,
        )
        for key, said in predictions.items()
        if "/" not in key
    }


def _evaluate(
    job: Job, torch_says: Mapping[str, Predictions], predictions: Mapping[str, Predictions]
) -> Iterator[Measurement]:
    """`test/...` is torch's own output, `test/<runtime>/...` the runtime's."""
    for name, said in torch_says.items():
        prefix = f"{name}/test" if name else "test"
        yield from evaluate(said, job.spec, prefix=prefix)
    for key, said in predictions.items():
        name, runtime = split_key(key)
        prefix = f"{name}/test/{runtime}" if name else f"test/{runtime}"
        yield from evaluate(said, job.spec, prefix=prefix)


def _count(job: Job, evidence: Evidence) -> Iterator[Measurement]:
    """Of each candidate; layer by layer in layers.csv."""
    shape = job.spec.input_shape
    costs = {name: count_layers(net, shape) for name, net in evidence.nets.items()}
    shown = {name or "deployed": layers for name, layers in costs.items()}
    write_layers(shown, job.config.directory / "layers.csv")
    for name, layers in costs.items():
        for measurement in measure_complexity(layers, shape):
            prefixed = f"{name}/{measurement.name}" if name else measurement.name
            yield replace(measurement, name=prefixed)


def _describe_teacher(
    job: Job,
    teacher: Trained | None,
    said: Predictions | None,
    measurements: list[Measurement],
) -> dict[str, Any]:
    if teacher is None or said is None:
        return {}
    spots = find_blind_spots(Lookup(measurements), job.spec.class_names)
    described = describe_teacher(job, teacher, said)
    return {**described, "blind_spots": [asdict(spot) for spot in spots]}


def _verdict(
    job: Job,
    evidence: Evidence,
    measurements: list[Measurement],
    parity: list[dict[str, Any]],
    *,
    safety: Mapping[str, SafetyReport],
) -> dict[str, Any]:
    budgets = judge_budgets(measurements, list(job.runtimes), job.config.hardware)
    unmeasured = [key for key in evidence.bench.failures if "/" not in key]
    is_compared = not unmeasured or "baseline" not in evidence.artifacts
    verdicts = (report.verdict for report in safety.values())
    matches = ("PASS" if row["passed"] else "FAIL" for row in parity)
    has_answered = all(key in evidence.bench.predictions for key in unmeasured)
    plain: dict[str, Any] = {
        "budgets": [asdict(budget) for budget in budgets],
        "safety": worst_of(verdicts, is_complete=is_compared, nothing="not compared"),
        "parity": worst_of(matches, is_complete=has_answered, nothing="PASS"),
        "quantization": describe_arithmetic(
            [artifact.precision for artifact in evidence.artifacts[""].values()],
            evidence.bench.operators,
        ),
        "gain": describe_gain(_whole_gains(job, evidence, measurements), evidence.gains),
        "unmeasured": unmeasured,
    }
    return {**plain, "summary": summarise_verdict(**plain)}


def _whole_gains(job: Job, evidence: Evidence, measurements: list[Measurement]) -> Gains:
    """Of the deployed net over the uncompressed one; empty where they are the same."""
    return gains_of(measurements, job.runtimes) if "baseline" in evidence.artifacts else {}


def _stages(evidence: Evidence) -> list[dict[str, Any]]:
    made = {"train": evidence.baseline.key, "compress": evidence.deployed.key}
    return [
        {"name": stage, "seconds": seconds, "key": made.get(stage)}
        for stage, seconds in evidence.seconds.items()
    ]


def _artifacts(job: Job, evidence: Evidence) -> Iterator[dict[str, Any]]:
    root = job.config.directory
    for name, by_format in evidence.artifacts.items():
        for artifact in by_format.values():
            plain = artifact.to_json()
            plain["path"] = str(artifact.path.relative_to(root))
            plain["files"] = [str(file.relative_to(root)) for file in artifact.files]
            yield {"candidate": name, **plain}


def _write_examples(job: Job, predictions: Mapping[str, Predictions]) -> str:
    """A few test images with what each candidate said about them."""
    name = "examples.npz"
    any_of_them = next(iter(predictions.values()))
    positions = choose_examples(any_of_them)
    samples = job.data.data.test.samples
    write_examples(
        job.config.directory / name,
        images=np.stack([samples[position][0] for position in positions]),
        targets=any_of_them.targets[positions],
        logits={key: said.logits[positions] for key, said in predictions.items()},
    )
    return name
