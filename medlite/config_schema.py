"""The sections of the configuration that medlite owns: their types, and the ranges of values."""

from __future__ import annotations

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
    "train.learning_rate": 0,
    "train.weight_decay": 0,
    "train.budget_minutes": 0,
    "train.gradient_clip": 0,
    "benchmark.num_queries": 1,
    "benchmark.num_rounds": 1,
    "benchmark.num_warmup": 0,
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


def typed_section(section: str, schema: type, values: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The values as an instance of their schema, and what is wrong with them."""
    names = [f.name for f in fields(schema)]
    good, problems = OmegaConf.structured(schema), []
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
    """Values that are not allowed, or too small."""
    for key, allowed in ALLOWED.items():
        section, name = key.split(".")
        value = plain[section].get(name)
        if value is not None and str(value) not in allowed:
            yield f"{key}: {value!r} is not known, {did_you_mean(str(value), allowed)}"
    for key, least in AT_LEAST.items():
        section, name = key.split(".")
        value = plain[section].get(name)
        if isinstance(value, int | float) and value < least:
            yield f"{key}: {value} is below {least}"
