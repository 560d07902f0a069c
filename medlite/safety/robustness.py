"""Which of two models suffers more where images are worse than those of the test split.

Every condition is one corruption at one severity. A model's degradation there is the share of its
own task metric on clean images that it loses, 1 - corrupted / clean, as the relative corruption
error of Hendrycks & Dietterich (arXiv:1903.12261, section 4.2) leaves out what a model lacks on
clean images already. What counts is by how much the compressed model degrades more, on the same
images and on the same resamples of patients.

Shapes: N samples, G groups, R resamples, K logits, H W D height width depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medlite.errors import ConfigError, did_you_mean
from medlite.metrics import counts
from medlite.metrics.decisions import decisions
from medlite.metrics.intervals import bootstrap, percentile_interval
from medlite.metrics.paired_scores import group_of
from medlite.metrics.statistics import auc_statistics, group_sums, pooled
from medlite.metrics.task import count_formulas, primary_metric
from medlite.safety.corruptions import CORRUPTIONS, SEVERITIES, suite_of
from medlite.safety.judge import Question, SafetyItem, Verdict, judge_family, worst
from medlite.safety.resolution import Resolution, groups_behind_metric
from medlite.safety.statistics import PairedLoss
from medlite.types import Measurement

if TYPE_CHECKING:
    from torch import Tensor

    from medlite.metrics.intervals import Statistic
    from medlite.safety_settings import RobustnessSettings, SafetyMargins
    from medlite.types import DataSpec, Predictions

CLEAN = ("clean", 0)

Condition = tuple[str, int]
"""corruption and severity"""

Scores = Mapping[Condition, "Statistic"]
"""the task metric of one model under every condition, `CLEAN` among them"""


@dataclass(frozen=True, kw_only=True)
class RobustnessRow:
    """Both models under one condition; None where the task metric is not defined."""

    corruption: str
    severity: int
    baseline: float | None
    """task metric of the uncompressed model; None too where there is none"""
    compressed: float | None
    compressed_interval: tuple[float, float] | None
    baseline_degradation: float | None
    compressed_degradation: float | None
    """share of the model's own clean score that is lost"""
    difference: float | None
    """how much more the compressed model degrades"""
    interval: tuple[float, float] | None
    """95 %, of the difference"""


@dataclass(frozen=True, kw_only=True)
class RobustnessReport:
    """What a runtime's models lose under every corruption."""

    metric: str
    num_images: int
    num_groups: int
    group_kind: str
    clean_baseline: float | None
    clean_compressed: float | None
    rows: tuple[RobustnessRow, ...]
    items: tuple[SafetyItem, ...]
    """one a corruption, over its severities, and "robustness/clean"; empty without a baseline"""
    verdict: Verdict | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_settings(settings: RobustnessSettings) -> None:
    """Refuse corruptions and severities that do not exist.

    Raises:
        ConfigError: with every problem.
    """
    named = settings.corruptions
    is_list = isinstance(named, list)
    unknown = [name for name in named if name not in CORRUPTIONS] if is_list else []
    problems = [f"robustness.corruptions: {n!r}, {did_you_mean(n, CORRUPTIONS)}" for n in unknown]
    if not is_list and named != "auto":
        problems.append(
            f"robustness.corruptions: {named!r} is neither auto nor a list such as "
            "[gaussian_noise,blur]"
        )
    if any(severity not in SEVERITIES for severity in settings.severities):
        problems.append(f"robustness.severities: {settings.severities} are not all of 1 to 5")
    if not settings.severities or named == []:
        problems.append("robustness: nothing to do; say robustness.enabled=false instead")
    if problems:
        raise ConfigError(problems)


def conditions_of(settings: RobustnessSettings, modality: str) -> list[Condition]:
    """Every corruption at every severity."""
    names = suite_of(modality) if settings.corruptions == "auto" else settings.corruptions
    severities = sorted(set(settings.severities))
    return [(name, severity) for name in dict.fromkeys(names) for severity in severities]


def task_statistic(predictions: Predictions, spec: DataSpec) -> Statistic:
    """The task metric by the weights of groups; NaN where an output is not finite."""
    if not np.isfinite(predictions.logits).all():
        return lambda weights: torch.full((len(weights),), torch.nan, dtype=torch.float64)
    metric = primary_metric(spec)
    if metric == "auc":
        return auc_statistics(predictions, spec, group_of(predictions))[metric]
    return pooled(_counts_of_groups(predictions, spec), count_formulas(spec)[metric])


def groups_behind(predictions: Predictions, spec: DataSpec) -> int:
    """The fewest groups that one term of the task metric rests on, see `groups_behind_metric`."""
    return groups_behind_metric(_counts_of_groups(predictions, spec), task=spec.task)


def _counts_of_groups(predictions: Predictions, spec: DataSpec) -> Tensor:
    of_samples = counts.class_counts(
        decisions(torch.from_numpy(predictions.logits), spec.labels),
        torch.from_numpy(predictions.targets),
        labels=spec.labels,
        num_classes=len(spec.class_names),
    )
    return group_sums(of_samples, group_of(predictions), len(set(predictions.groups)))


def compare_robustness(
    baseline: Scores | None,
    compressed: Scores,
    *,
    groups: Sequence[str],
    spec: DataSpec,
    margins: SafetyMargins,
    num_groups_behind: int | None = None,
    seed: int = 0,
) -> RobustnessReport:
    """Compare both models' degradation under every condition, paired by patient.

    Verdicts are judged as the gate's are, with the margin of the task metric, on a corruption's
    degradation averaged over its severities; Holm's correction spans the corruptions. The item
    "robustness/clean" is what the compressed model loses before any corruption: a model that is
    bad on clean images has little left to lose.

    Args:
        baseline: of the uncompressed model; None where there is none.
        compressed: under the same conditions, on the same images.
        groups: the patient of each image.
        spec: the dataset.
        margins: resamples and the margin.
        num_groups_behind: the fewest groups that the metric rests on; None: all of them.
        seed: of the bootstrap.
    """
    num_groups = len(set(groups))
    sides = {"compressed": compressed} | ({} if baseline is None else {"baseline": baseline})
    statistics = {
        f"{side}:{name}:{severity}": statistic
        for side, scores in sides.items()
        for (name, severity), statistic in scores.items()
    }
    resampled = bootstrap(
        statistics, num_groups=num_groups, num_resamples=margins.num_resamples, seed=seed
    )
    once = torch.ones(1, num_groups, dtype=torch.float64)
    values = {  # the score itself first, then those of the resamples
        key: np.concatenate((statistic(once).numpy(), resampled[key]))
        for key, statistic in statistics.items()
    }
    scores = {
        side: {condition: values[f"{side}:{condition[0]}:{condition[1]}"] for condition in of_side}
        for side, of_side in sides.items()
    }
    rows = tuple(_row(condition, scores) for condition in compressed if condition != CLEAN)
    behind = num_groups if num_groups_behind is None else num_groups_behind
    kind = f"{spec.group_kind}s" + " behind the rarest class" * (behind < num_groups)
    resolution = Resolution(num_groups=behind, group_kind=kind, is_proportion=False)
    items = tuple(_judge(scores, margins.metric_drop, resolution)) if baseline is not None else ()
    return RobustnessReport(
        metric=primary_metric(spec),
        num_images=len(groups),
        num_groups=num_groups,
        group_kind=spec.group_kind,
        clean_baseline=None if baseline is None else known(scores["baseline"][CLEAN][0]),
        clean_compressed=known(scores["compressed"][CLEAN][0]),
        rows=rows,
        items=items,
        verdict=worst(items) if items else None,
    )


def robustness_measurements(runtime: str, report: Mapping[str, Any]) -> Iterator[Measurement]:
    """A report's rows under flat keys, `robustness/<runtime>/<corruption>/<severity>/...`."""
    metric, n = report["metric"], report["num_images"]
    note = f"bootstrap interval over {report['num_groups']} {report['group_kind']}s"
    for row in report["rows"]:
        key = f"robustness/{runtime}/{row['corruption']}/{row['severity']}"
        wanted = {
            f"{key}/{metric}": (row["compressed"], row["compressed_interval"], True),
            f"{key}/degradation": (row["compressed_degradation"], None, False),
        }
        if report["clean_baseline"] is not None:
            wanted |= {
                f"baseline/{key}/{metric}": (row["baseline"], None, True),
                f"baseline/{key}/degradation": (row["baseline_degradation"], None, False),
                f"{key}/extra_degradation": (row["difference"], row["interval"], False),
            }
        for name, (value, interval, is_higher_better) in wanted.items():
            if value is None:
                reason = "the task metric is not defined on these images"
                yield Measurement.unavailable(name, "", reason)
                continue
            yield Measurement(
                name=name,
                value=value,
                unit="",
                n=n,
                spread=None if interval is None else (interval[0], interval[1]),
                higher_is_better=is_higher_better,
                note=note if interval else "",
            )


def known(value: float) -> float | None:
    """None for what is not a number."""
    return float(value) if np.isfinite(value) else None


def degradation(of_side: Mapping[Condition, np.ndarray], condition: Condition) -> np.ndarray:
    """Share of the clean score that is lost, (1 + R,)."""
    clean = of_side[CLEAN]
    return 1 - of_side[condition] / np.where(clean > 0, clean, np.nan)


def _row(
    condition: Condition, scores: Mapping[str, Mapping[Condition, np.ndarray]]
) -> RobustnessRow:
    after = scores["compressed"]
    lost = {side: degradation(of_side, condition) for side, of_side in scores.items()}
    before = scores.get("baseline")
    extra = None if before is None else lost["compressed"] - lost["baseline"]
    return RobustnessRow(
        corruption=condition[0],
        severity=condition[1],
        baseline=None if before is None else known(before[condition][0]),
        compressed=known(after[condition][0]),
        compressed_interval=percentile_interval(after[condition][1:]),
        baseline_degradation=None if before is None else known(lost["baseline"][0]),
        compressed_degradation=known(lost["compressed"][0]),
        difference=None if extra is None else known(extra[0]),
        interval=None if extra is None else percentile_interval(extra[1:]),
    )


def _judge(
    scores: Mapping[str, Mapping[Condition, np.ndarray]], margin: float, resolution: Resolution
) -> Iterator[SafetyItem]:
    before, after = scores["baseline"], scores["compressed"]
    clean = before[CLEAN]
    loss = 1 - after[CLEAN] / np.where(clean > 0, clean, np.nan)
    question = _question("clean", np.zeros_like(loss), loss, margin, resolution)
    yield from judge_family([question])
    names = dict.fromkeys(name for name, _ in after if name != CLEAN[0])
    questions = []
    for name in names:
        mean = [
            np.mean([degradation(side, each) for each in side if each[0] == name], axis=0)
            for side in (before, after)
        ]
        questions.append(_question(name, mean[0], mean[1], margin, resolution))
    yield from judge_family(questions)


def _question(
    name: str, before: np.ndarray, after: np.ndarray, margin: float, resolution: Resolution
) -> Question:
    loss = after - before
    paired = PairedLoss(
        first=float(before[0]), second=float(after[0]), loss=float(loss[0]), samples=loss[1:]
    )
    return Question(name=f"robustness/{name}", paired=paired, margin=margin, resolution=resolution)
