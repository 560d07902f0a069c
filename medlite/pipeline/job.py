"""What all stages of one job share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import nn

from medlite import __version__
from medlite.config import JobConfig, build, locate
from medlite.data.image_data import ImageData
from medlite.data.module import ImageDataModule
from medlite.errors import ConfigError, ShapeError
from medlite.store import Store
from medlite.types import CompressionStep, DataSpec, Runtime


@dataclass(frozen=True, kw_only=True)
class Job:
    """One configuration with its data, its store and its loggers.

    Args:
        config: checked settings.
        data: loaders over the three splits.
        loggers: the name of a fit -> Lightning loggers for its curves.
    """

    config: JobConfig
    data: ImageDataModule
    loggers: Callable[[str], list[Logger]]

    @property
    def spec(self) -> DataSpec:
        """Of the dataset."""
        return self.data.spec

    @cached_property
    def store(self) -> Store:
        """Where trained weights are kept."""
        return Store(self.config.outputs / "store")

    @cached_property
    def steps(self) -> dict[str, CompressionStep]:
        """The compression steps, in order."""
        return {name: build(node) for name, node in self.config.compression.items()}

    @cached_property
    def runtimes(self) -> dict[str, Runtime]:
        """The engines to measure on."""
        return build_runtimes(self.config.runtime)

    def build_net(self, model: Mapping[str, Any]) -> nn.Module:
        """A freshly initialised net for the dataset, the same for the same seed."""
        return build_net(model, self.spec, seed=self.config.seed)

    def made_of(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides a trained baseline's weights."""
        return {
            "medlite": __version__,
            "dataset": self.config.dataset,
            "data": self.data.data.fingerprint,
            "model": dict(model),
            "train": asdict(self.config.train),
            "seed": self.config.seed,
        }


def build_runtimes(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Runtime]:
    """The engines of a configuration, in order.

    Each is named as its key, whatever it says itself: all figures of a job stand under that name.
    """
    return {name: build(node, name=name) for name, node in nodes.items()}


def build_net(model: Mapping[str, Any], spec: DataSpec, *, seed: int) -> nn.Module:
    """A freshly initialised net for a dataset, the same for the same seed."""
    torch.manual_seed(seed)
    return build(
        model,
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        image_size=spec.image_size,
        spatial_dims=spec.num_spatial_dims,
    )


def check_task(config: JobConfig, spec: DataSpec) -> None:
    """Refuse a model that is not made for the dataset's task or dimensions.

    Raises:
        ConfigError: names models that are.
    """
    target = locate(config.model["_target_"])
    tasks = getattr(target, "tasks", (spec.task,))
    if spec.task not in tasks:
        suggestion = {
            "segmentation": "model=unet, or a timm encoder with model=timm_unet model.encoder=...",
            "classification": "model=mobilenetv3_small, or any timm network with model=timm",
        }[spec.task]
        name = config.choices["model"]
        problem = (
            f"model={name}: is for {' or '.join(tasks)}, and dataset={config.choices['dataset']} "
            f"is for {spec.task}: try {suggestion}"
        )
        raise ConfigError([problem])


@contextmanager
def remedies_for(config: JobConfig, images: ImageData) -> Iterator[None]:
    """Say of an image size that a model cannot take how the job's own dataset gives another.

    Raises:
        ShapeError: the one that was raised inside, with a remedy that works.
    """
    try:
        yield
    except ShapeError as error:
        if error.size is None or "image_size" in config.dataset:
            raise
        wanted = [s for s in images.sides if s >= max(error.size) and s % error.divisor == 0]
        if wanted and "size" in config.dataset:
            message = f"{error.problem}; set dataset.size={min(wanted)}"
        else:
            name = config.choices["dataset"]
            message = (
                f"{error.problem}; dataset={name} has no other images: take another model or "
                "dataset"
            )
        raise ShapeError(message) from error
