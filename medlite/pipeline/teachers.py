"""Who teaches a step: nets that the job trains by its own settings, and nets that are finished."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from medlite.compression.ensemble import Ensemble
from medlite.config import JobConfig, build, locate, model_config
from medlite.errors import ConfigError
from medlite.pipeline.job import Job, build_net
from medlite.pipeline.state_dicts import load_strictly, read_state_dict
from medlite.report.result import FILE_NAME, RunResult, read_result
from medlite.store import Entry, Store
from medlite.types import CompressionStep, DataSpec

DEFAULT_TEACHERS = {"segmentation": "unet", "classification": "resnet18"}
"""what `teacher: auto` names"""

_TIMM = "timm/"
_TIMM_OPTIONS = {"segmentation": ("timm_unet", "encoder"), "classification": ("timm", "name")}
"""model option for each task, and its value that names the network"""


@dataclass(frozen=True, kw_only=True)
class ToTrain:
    """A model for the job's own settings and the store."""

    name: str
    model: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A net whose weights exist."""

    name: str
    key: str
    """names the weights, whatever path they lie at"""
    build: Callable[[], nn.Module]
    """the net in evaluation mode"""
    answers: bool = True
    """whether its logits are of the job's own task and classes"""


def find_teachers(job: Job, step: CompressionStep) -> list[ToTrain | Finished]:
    """What a step names as its teachers; empty for steps without any.

    Raises:
        MedliteError: there is no such teacher, or it does not go with the job.
    """
    compares_logits = getattr(step, "compares_logits", True)
    names = _names(getattr(step, "teacher", None))
    return [_find(job, name, compares_logits=compares_logits) for name in names]


def as_one(job: Job, nets: list[nn.Module]) -> nn.Module:
    """A single teacher as it is, several as their mean."""
    return nets[0] if len(nets) == 1 else Ensemble(nets, labels=job.spec.labels)


def file_marks(config: JobConfig) -> Iterator[str]:
    """A hash for each file that a step of the configuration learns from: paths do not name weights.

    A file that is not there is left out; `find_teachers` says so.
    """
    for node in config.compression.values():
        for name in _names(node.get("teacher")):
            path = Path(name.partition("@")[2]) if _is_checkpoint(name) else _record_of(name)
            if path.is_file():
                yield _sha256(path)


def _names(teacher: Any) -> list[str]:
    return [teacher] if isinstance(teacher, str) else list(teacher or ())


def _find(job: Job, name: str, *, compares_logits: bool) -> ToTrain | Finished:
    if _is_checkpoint(name):
        return _from_checkpoint(job, *name.split("@", 1))
    if name.startswith(_TIMM):
        return _from_timm(job, name.removeprefix(_TIMM))
    if "/" in name or name.endswith(".json"):
        return _from_run(job, _record_of(name), compares_logits=compares_logits)
    option = DEFAULT_TEACHERS[job.spec.task] if name == "auto" else name
    return _to_train(job, option, model_config(option, job.config.conf_directories, key="teacher"))


def _is_checkpoint(name: str) -> bool:
    return "@" in name and not Path(name).exists()


def _record_of(name: str) -> Path:
    path = Path(name)
    return path if path.name == FILE_NAME else path / FILE_NAME


def _to_train(job: Job, name: str, model: dict[str, Any]) -> ToTrain:
    tasks = getattr(locate(model["_target_"]), "tasks", (job.spec.task,))
    if job.spec.task not in tasks:
        problem = (
            f"teacher: {name} is for {' or '.join(tasks)} and would be trained on "
            f"dataset={job.spec.name}, which is for {job.spec.task}; take a model for that, or the "
            "directory of a finished run with distill.alpha=0 to learn from its maps alone"
        )
        raise ConfigError([problem])
    return ToTrain(name=name, model=model)


def _from_timm(job: Job, name: str) -> ToTrain:
    option, key = _TIMM_OPTIONS[job.spec.task]
    model = model_config(option, job.config.conf_directories, key="teacher")
    return ToTrain(name=f"{option}_{name}", model=model | {key: name, "pretrained": True})


def _from_checkpoint(job: Job, option: str, file: str) -> Finished:
    model = model_config(option, job.config.conf_directories, key="teacher")
    path = Path(file)
    if not path.is_file():
        problem = f"teacher: there is no file {file}; a checkpoint is named as MODEL@FILE"
        raise ConfigError([problem])

    def make() -> nn.Module:
        net = job.build_net(model)
        load_strictly(net, read_state_dict(path), whose=f"teacher: {path} for model={option}")
        return net.eval()

    return Finished(name=f"{option}@{path.name}", key=f"{option}@{_sha256(path)}", build=make)


def _from_run(job: Job, record: Path, *, compares_logits: bool) -> Finished:
    if not record.exists():
        problem = (
            f"teacher: {record.parent} is no finished run: it has no {FILE_NAME}, which the last "
            "stage writes; a model option has no '/' in it, a checkpoint is named as MODEL@FILE"
        )
        raise ConfigError([problem])
    result = read_result(record)
    spec = _spec_of(result)
    run = record.parent.name
    problems = list(_differences(run, spec, job.spec, compares_logits=compares_logits))
    if problems:
        raise ConfigError(problems)
    stages = list(_float_stages(result))
    store = Store(record.parent.parent.parent / "store")
    entries = [Entry(store.root / row["key"]) for row, _ in stages]
    gone = [entry.key for entry in entries if not entry.is_done]
    if gone or not stages:
        problem = (
            f"teacher: the weights of {record.parent} are not in {store.root} any more "
            f"({', '.join(gone) or 'it tells none'}); delete its file 'done' and run it again"
        )
        raise ConfigError([problem])

    def make() -> nn.Module:
        net = build_net(result.config["model"], spec, seed=result.config["seed"]).eval()
        for (_, step), entry in zip(stages, entries, strict=True):
            weights, state = entry.load()
            net = net if step is None else step.restore(net, state, spec)
            load_strictly(net, weights, whose=f"teacher: {entry.directory}")
        return net.eval()

    row = stages[-1][0]
    name = f"{run} ({row['stage']})"
    answers = not list(_differences(run, spec, job.spec, compares_logits=True))
    return Finished(name=name, key=row["sha256"], build=make, answers=answers)


def _float_stages(
    result: RunResult,
) -> Iterator[tuple[Mapping[str, Any], CompressionStep | None]]:
    """The rows of a run's lineage with their steps, until one quantises."""
    for row in result.lineage:
        if row["stage"] == "train":
            yield row, None
            continue
        step = build(result.config["compression"][row["stage"]])
        if step.stage == "numeric":
            return
        yield row, step


def _spec_of(result: RunResult) -> DataSpec:
    plain: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in result.dataset.items()
    }
    return DataSpec(**plain)


def _differences(
    run: str, taught: DataSpec, wanted: DataSpec, *, compares_logits: bool
) -> Iterable[str]:
    facts: dict[str, tuple[Any, Any]] = {"images": (taught.input_shape, wanted.input_shape)}
    if compares_logits:
        facts |= {
            "task": (taught.task, wanted.task),
            "labels": (taught.labels, wanted.labels),
            "classes": (taught.class_names, wanted.class_names),
        }
    for fact, (of_run, of_job) in facts.items():
        if of_run != of_job:
            mend = "take a run on the same data"
            if fact != "images":
                mend += ", or distill.alpha=0 to learn from its maps alone"
            yield (
                f"teacher: the {fact} of run {run} are {_shown(of_run)}, "
                f"of dataset={wanted.name} {_shown(of_job)}; {mend}"
            )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"({', '.join(map(str, value))})"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
