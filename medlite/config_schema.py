"""The sections of the configuration that medlite owns: their types, and the ranges of values."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medlite.errors import did_you_mean
from medlite.safety_settings import (
    ExplainabilitySettings,
    RobustnessSettings,
    SafetyMargins,
    ShortcutSettings,
)
from medlite.types import BenchmarkSettings, Hardware, TrainSettings


@dataclass(kw_only=True)
class LoggerSettings:
    """Where curves and results go besides the run directory."""

    kind: str = "wandb"
    """wandb | csv | none"""
    project: str = "medlite"
    mode: str = "offline"
    """offline | online"""
    group: str | None = None
    """None: all jobs of a sweep share one group"""


TYPED = {
    "hardware": Hardware,
    "train": TrainSettings,
    "benchmark": BenchmarkSettings,
    "safety": SafetyMargins,
    "robustness": RobustnessSettings,
    "shortcuts": ShortcutSettings,
    "explainability": ExplainabilitySettings,
    "logger": LoggerSettings,
}

ALLOWED = {
    "train.precision": ("auto", "32", "bf16", "16"),
    "train.accelerator": ("auto", "cpu", "cuda"),
    "train.class_weights": ("none", "balanced"),
    "train.loss": ("auto", "cross_entropy", "focal", "dice_ce", "dice_focal"),
    "hardware.device": ("cpu", "cuda"),
    "logger.kind": ("wandb", "csv", "none"),
    "logger.mode": ("offline", "online"),
}

AT_LEAST = {
    "train.epochs": 1,
    "train.batch_size": 1,
    "train.num_workers": 0,
    "train.weight_decay": 0,
    "train.budget_minutes": 0,
    "train.gradient_clip": 0,
    "train.warmup_ratio": 0,
    "train.ema_decay": 0,
    "train.early_stopping_patience": 1,  # 0 would stop as 1 does, and reads like "off"
    "benchmark.num_queries": 2,
    "benchmark.num_rounds": 2,
    "benchmark.num_warmup": 1,
    "benchmark.batch_size": 1,
    "benchmark.throughput_batch_size": 1,
    "benchmark.throughput_seconds": 0,
    "hardware.num_threads": 1,
    "safety.num_resamples": 500,
    "safety.metric_drop": 0,
    "safety.sensitivity_drop": 0,
    "safety.ece_increase": 0,
    "safety.nll_increase": 0,
    "robustness.num_images": 1,
    "shortcuts.num_images": 1,
    "explainability.num_images": 1,
}

ABOVE = {
    "train.learning_rate": 0,
    "benchmark.timeout_seconds": 0,
    "hardware.memory_limit_mib": 0,
}

AT_MOST = {"train.warmup_ratio": 1}

BELOW = {"train.ema_decay": 1}

_BOUNDS = (
    (AT_LEAST, operator.ge, "is below"),
    (ABOVE, operator.gt, "is not above"),
    (AT_MOST, operator.le, "is above"),
    (BELOW, operator.lt, "is not below"),
)
"""bounds, what holds within them, and what is said of a value outside"""


def typed_section(section: str, schema: type, values: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The values as an instance of their schema, and what is wrong with them."""
    names = [f.name for f in fields(schema)]
    good, problems = OmegaConf.structured(schema), []
    if not isinstance(values, Mapping):
        problems.append(
            f"{section}: expected settings such as {section}.{names[0]}, got {values!r}"
        )
        return schema(), problems
    for key, value in values.items():
        if key not in names:
            problems.append(f"{section}.{key}: unknown, {did_you_mean(key, names)}")
            continue
        try:
            good[key] = value
        except OmegaConfBaseException as error:
            problems.append(f"{section}.{key}: {str(error).splitlines()[0]}")
    return OmegaConf.to_object(good), problems


def check_values(plain: Mapping[str, Any]) -> Iterator[str]:
    """Values that are not allowed, or out of their range."""
    for key, allowed in ALLOWED.items():
        value = _value(plain, key)
        if value is not None and str(value) not in allowed:
            yield f"{key}: {value!r} is not known, {did_you_mean(str(value), allowed)}"
    for bounds, holds, says in _BOUNDS:
        for key, bound in bounds.items():
            value = _value(plain, key)
            if isinstance(value, int | float) and not holds(value, bound):
                yield f"{key}: {value} {says} {bound}"


def _value(plain: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    values = plain[section]
    return values.get(name) if isinstance(values, Mapping) else None


@dataclass
class _Switch:
    is_on: bool = False


def _as_switch(value: Any) -> bool:
    """True or false, also from words such as "no", which YAML leaves as text.

    Raises:
        OmegaConfBaseException: it is neither.
    """
    switch = OmegaConf.structured(_Switch)
    switch.is_on = value
    return switch.is_on


def job_values(plain: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys that belong to no section, as what they must be, and what is wrong with them.

    >>> job_values({"name": 7, "outputs": "o", "seed": 1, "control": "no", "stages": "train"})
    ({'name': '7', 'outputs': 'o', 'seed': 1, 'control': False, 'stages': ['train']}, [])
    """
    values = {key: plain.get(key) for key in ("name", "outputs", "seed", "control", "stages")}
    problems = []
    for key in ("name", "outputs"):
        if values[key] in (None, "") or isinstance(values[key], list | dict):
            problems.append(f"{key}: {values[key]!r} is no name")
        values[key] = str(values[key])
    seed, stages = values["seed"], values["stages"]
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        problems.append(f"seed: {seed!r} is not a whole number from 0 up")
    try:
        values["control"] = _as_switch(values["control"])
    except OmegaConfBaseException:
        problems.append(f"control: {values['control']!r} is neither true nor false")
    if isinstance(stages, str):
        values["stages"] = [stages]
    elif not isinstance(stages, list) or not all(isinstance(each, str) for each in stages):
        problems.append(f"stages: expected names such as [train], got {stages!r}")
        values["stages"] = []
    return values, problems
