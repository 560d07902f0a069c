"""Which runs are of the same experiment, and the words that tell the others apart."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medlite.report.result import RunResult

ELSEWHERE = ("seed", "name", "outputs", "logger", "stages")
"""sections that say where a run goes, and the seed"""
NOT_COMPARED = ("robustness", "shortcuts", "explainability")
"""sections that decide nothing of a comparison's rows"""
IMAGES = ("name", "class_names", "num_samples", "num_groups")
"""facts of a data set that runs on the same images share, of whatever size"""
SHAPE = ("in_channels", "num_classes", "image_size")
"""facts of a data set that a net is built for"""


@dataclass(frozen=True)
class Names:
    """What a row is called: the chosen options, with what they set differently."""

    dataset: str
    model: str
    compression: str


def settings_digest(result: RunResult, runtime: str) -> str:
    """6 hexadecimal digits of all that decides a run's row on a runtime, but the seed.

    That is also the version of medlite. Records hold no paths: the facts of the data set, and the
    hashes of files that a step learned from, stand for them.
    """
    sections = _decisive(result.config, runtime)
    order = list(sections.get("compression", {}))
    version = result.environment.get("packages", {}).get("medlite")
    return _digest([sections, order, result.dataset, result.learned_from, version])


def images_digest(result: RunResult) -> str:
    """6 hexadecimal digits that are the same for runs that saw the same images, of any size."""
    split = result.config.get("dataset", {}).get("split_seed")
    return _digest([split, *(result.dataset.get(fact) for fact in IMAGES)])


def net_digest(result: RunResult, runtime: str) -> str:
    """6 hexadecimal digits that are the same where uncompressed nets must be equally fast."""
    sections = _decisive(result.config, runtime)
    parts = [sections.get(part) for part in ("model", "hardware", "runtime", "benchmark")]
    return _digest([*parts, *(result.dataset.get(fact) for fact in SHAPE)])


def tell_apart(rows: Sequence[tuple[RunResult, str]]) -> list[Names]:
    """The names of each run on a runtime.

    One of runs with sparsities of 0.5 and 0.9 is "sparsify (sparsity=0.5)"; one of runs of the
    same name that were trained for 5 and for 15 epochs "none (train.epochs=5)".
    """
    options = [_options(result.config, runtime) for result, runtime in rows]
    of_steps = _varied_by_group(
        [tuple(k for k in each if _is_of_step(k)) for each in options], options
    )
    of_namesakes = _varied_by_group([_words(*row) for row in rows], options)
    names = [
        _names(
            result,
            {
                key: value
                for key, value in own.items()
                if key in (steps if _is_of_step(key) else others)
            },
        )
        for (result, _), own, steps, others in zip(
            rows, options, of_steps, of_namesakes, strict=True
        )
    ]
    return _with_digests(rows, names)


def _varied_by_group(
    groups: Sequence[tuple[str, ...]], options: Sequence[Mapping[str, Any]]
) -> list[set[str]]:
    """For each row the keys whose values are not the same in all rows of its group."""
    values: dict[tuple[str, ...], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    sizes = Counter(groups)
    counts: Counter[tuple[tuple[str, ...], str]] = Counter()
    for group, own in zip(groups, options, strict=True):
        for key, value in own.items():
            values[group][key].add(repr(value))
            counts[group, key] += 1
    varied = {
        group: {k for k, v in found.items() if len(v) > 1 or counts[group, k] < sizes[group]}
        for group, found in values.items()
    }
    return [varied.get(group, set()) for group in groups]


def _names(result: RunResult, varied: Mapping[str, Any]) -> Names:
    choices = result.choices
    by_part: dict[str, list[str]] = {"dataset": [], "model": [], "compression": []}
    steps = result.config.get("compression", {})
    for key, value in varied.items():
        section, _, rest = key.partition(".")
        if section == "compression" and len(steps) == 1:
            rest = rest.partition(".")[2]
        part = section if section in by_part else "compression"
        by_part[part].append(f"{rest if section in by_part else key}={value}")
    return Names(
        dataset=_called(result.dataset["name"], by_part["dataset"]),
        model=_called(choices.get("model", ""), by_part["model"]),
        compression=_called(choices.get("compression", "none"), by_part["compression"]),
    )


def _with_digests(rows: Sequence[tuple[RunResult, str]], names: Sequence[Names]) -> list[Names]:
    """The names, with the settings' digest where runs that differ would have one name."""
    digests = [settings_digest(*row) for row in rows]
    found: dict[tuple[Names, tuple[str, ...]], set[str]] = defaultdict(set)
    for own, row, digest in zip(names, rows, digests, strict=True):
        found[own, _words(*row)].add(digest)
    return [
        replace(own, compression=f"{own.compression} (settings {digest})")
        if len(found[own, _words(*row)]) > 1
        else own
        for own, row, digest in zip(names, rows, digests, strict=True)
    ]


def _called(name: str, differences: Sequence[str]) -> str:
    return f"{name} ({', '.join(differences)})" if differences else name


def _words(result: RunResult, runtime: str) -> tuple[str, ...]:
    chosen = (result.choices.get(group, "") for group in ("model", "compression", "hardware"))
    return (result.dataset["name"], runtime, *chosen)


def _is_of_step(key: str) -> bool:
    return key.startswith("compression.")


def _options(config: Mapping[str, Any], runtime: str) -> dict[str, Any]:
    """All decisive values by their keys, those of steps that are the training's own left out."""
    training = config.get("train", {})
    options = _flat(_decisive(config, runtime))
    return {
        key: "as trained"
        if _is_of_step(key) and (key.rpartition(".")[2], value) in training.items()
        else value
        for key, value in options.items()
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif key != "_target_":
            found[prefix + key] = value
    return found


def _decisive(config: Mapping[str, Any], runtime: str) -> dict[str, Any]:
    left_out = {*ELSEWHERE, *NOT_COMPARED}
    sections = {key: value for key, value in config.items() if key not in left_out}
    sections["runtime"] = (config.get("runtime") or {}).get(runtime)
    margins = config.get("safety") or {}
    sections["safety"] = {key: value for key, value in margins.items() if key != "enforce"}
    # How long is measured decides no figure, but how many images make a query does.
    sections["benchmark"] = {"batch_size": (config.get("benchmark") or {}).get("batch_size", 1)}
    return sections


def _digest(made_of: Any) -> str:
    canonical = json.dumps(made_of, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:6]
