"""Which classes are forgotten first as the compression grows, from the records of a sweep.

Holste et al., "How Does Pruning Impact Long-Tailed Multi-Label Medical Image Classifiers?", MICCAI
2023 (arXiv:2308.09180): each class's average precision relative to that of the uncompressed model,
against sparsity, and the first sparsity at which it has fallen by over 20 %. Here against any
number that says how strongly a step compresses; for segmentation the Dice takes the place of the
AP. Both scores are those of the safety gate, of the runtime's own output on the test split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, NamedTuple

from medlite.metrics.names import class_keys
from medlite.report.result import RunResult
from medlite.report.sameness import settings_digest
from medlite.report.seeds import half_width

LARGEST_DROP = 0.2

RISING = {
    "sparsify.sparsity": True,
    "prune.ratio": True,
    "low_rank.macs_ratio": False,
    "prune_tokens.keep_ratio": False,
    "ptq.weight_bits": False,
    "qat.weight_bits": False,
}
"""what says how strongly a step compresses, and whether more of it is more compression"""


class Scores(NamedTuple):
    """One class's score before and after, and whether that before is any better than chance."""

    before: float
    after: float
    is_learned: bool


@dataclass(frozen=True, kw_only=True)
class Level:
    """One class at one strength of the compression: means over the seeds."""

    strength: float
    relative: float
    """compressed over uncompressed"""
    half_width: float | None
    """of the 95 % interval over the seeds (Student's t); None of one seed"""
    num_seeds: int


@dataclass(frozen=True, kw_only=True)
class ClassCurve:
    """How one class fares as the compression grows.

    Seeds whose uncompressed model is no better than chance at the class are left out: the AUC is
    0.5 or less, or the Dice no higher than that of calling every pixel the class.
    """

    class_name: str
    prevalence: float
    """share of the training images (pixels)"""
    baseline: float | None
    """mean score of the uncompressed models, those no better than chance too"""
    levels: tuple[Level, ...]
    """the mildest first; none where nothing was learned that could be forgotten"""
    num_seeds_at_chance: int

    @property
    def forgotten_at(self) -> float | None:
        """The mildest strength at which the mean has fallen by over 20 %."""
        fallen = (each.strength for each in self.levels if each.relative < 1 - LARGEST_DROP)
        return next(fallen, None)


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """All classes of one model and recipe on one runtime, the most frequent first."""

    dataset: str
    model: str
    compression: str
    runtime: str
    key: str
    """the swept value: compression.sparsify.sparsity ..."""
    score: str
    """AP or Dice"""
    strengths: tuple[float, ...]
    """the mildest first"""
    classes: tuple[ClassCurve, ...]


def forgetting_curves(results: Iterable[RunResult]) -> list[Forgetting]:
    """One for each group of runs that differ in one strength, and in their seeds, alone."""
    groups: dict[tuple[str, ...], list[tuple[float, RunResult]]] = defaultdict(list)
    for result in results:
        for runtime in result.safety:
            for key, strength, recipe in strengths_of(result, runtime):
                names = result.dataset["name"], result.choices.get("model", "")
                groups[key, runtime, recipe, *names].append((strength, result))
    return [
        _forgetting(runs, key=key, runtime=runtime)
        for (key, runtime, *_), runs in groups.items()
        if len({strength for strength, _ in runs}) > 1
    ]


def strengths_of(result: RunResult, runtime: str) -> Iterator[tuple[str, float, str]]:
    """Each strength of a recipe: its key, its value, and all that decides a run besides."""
    steps = result.config["compression"]
    for key in RISING:
        step, option = key.split(".")
        value = (steps.get(step) or {}).get(option)
        if value is None:
            continue
        others = {name: each for name, each in steps[step].items() if name != option}
        rest = {**result.config, "compression": {**steps, step: others}}
        yield key, float(value), settings_digest(replace(result, config=rest), runtime)


def class_scores(result: RunResult, runtime: str) -> dict[str, Scores]:
    """Those of each class that the gate could compare on the test split, by class name."""
    report, dataset = result.safety[runtime], result.dataset
    items = {item["name"]: item for item in (*report["items"], *report.get("shown", ()))}
    classes = _scored_classes(dataset)
    loss = f"safety/{_score_of(dataset).lower()}_drop"
    found = {}
    for name, key in classes:
        item = items.get(f"{loss}/{key}") or (items.get(loss) if len(classes) == 1 else None)
        if item is None or None in (item["baseline"], item["compressed"]):
            continue
        found[name] = Scores(
            before=item["baseline"],
            after=item["compressed"],
            is_learned=item["baseline"] > _chance(dataset, name)
            and _ranks(items.get(f"safety/auc_drop/{key}")),
        )
    return found


def prevalences(dataset: Mapping[str, Any]) -> dict[str, float]:
    """Each class's share of the training images, or of their pixels."""
    counts = dataset["class_counts"]
    is_segmentation = dataset["task"] == "segmentation"
    total = sum(counts) if is_segmentation else dataset["num_samples"]["train"]
    shares = (count / total for count in counts)
    return dict(zip(dataset["class_names"], shares, strict=True))


def _chance(dataset: Mapping[str, Any], class_name: str) -> float:
    """The Dice of calling every pixel the class; an AP above 0 is judged by its AUC."""
    if dataset["task"] != "segmentation":
        return 0.0
    share = prevalences(dataset)[class_name]
    return 2 * share / (1 + share)


def _ranks(auc: Mapping[str, Any] | None) -> bool:
    """Whether the uncompressed model ranks better than chance, which is 0.5 of any class."""
    return auc is None or auc["baseline"] is None or auc["baseline"] > 0.5


def _scored_classes(dataset: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and key of those that have a score of their own: no background, one of two classes."""
    names = dataset["class_names"]
    has_opposite = dataset["task"] == "segmentation" or dataset["labels"] == "binary"
    return list(zip(names, class_keys(names), strict=True))[1 if has_opposite else 0 :]


def _score_of(dataset: Mapping[str, Any]) -> str:
    return "Dice" if dataset["task"] == "segmentation" else "AP"


def _forgetting(runs: Sequence[tuple[float, RunResult]], *, key: str, runtime: str) -> Forgetting:
    by_strength: dict[float, dict[int, dict[str, Scores]]] = defaultdict(dict)
    for strength, result in runs:  # a run that was repeated is no second sample
        by_strength[strength][result.config.get("seed", 0)] = class_scores(result, runtime)
    strengths = sorted(by_strength, reverse=not RISING[key])
    first = runs[0][1]
    shares = prevalences(first.dataset)
    curves = [
        _curve(name, shares[name], {each: by_strength[each] for each in strengths})
        for name, _ in _scored_classes(first.dataset)
    ]
    return Forgetting(
        dataset=first.dataset["name"],
        model=first.choices.get("model", ""),
        compression=first.choices.get("compression", ""),
        runtime=runtime,
        key=f"compression.{key}",
        score=_score_of(first.dataset),
        strengths=tuple(strengths),
        classes=tuple(sorted(curves, key=lambda curve: -curve.prevalence)),
    )


def _curve(
    name: str, prevalence: float, runs: Mapping[float, Mapping[int, Mapping[str, Scores]]]
) -> ClassCurve:
    baselines: dict[int, float] = {}
    at_chance: set[int] = set()
    levels = []
    for strength, by_seed in runs.items():
        known = {seed: scores[name] for seed, scores in by_seed.items() if name in scores}
        baselines |= {seed: scores.before for seed, scores in known.items()}
        at_chance |= {seed for seed, scores in known.items() if not scores.is_learned}
        ratios = [each.after / each.before for each in known.values() if each.is_learned]
        if ratios:
            levels.append(
                Level(
                    strength=strength,
                    relative=mean(ratios),
                    half_width=half_width(ratios),
                    num_seeds=len(ratios),
                )
            )
    return ClassCurve(
        class_name=name,
        prevalence=prevalence,
        baseline=mean(baselines.values()) if baselines else None,
        levels=tuple(levels),
        num_seeds_at_chance=len(at_chance),
    )
