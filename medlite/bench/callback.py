"""The benchmark as a Lightning callback, for anybody's Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
from torch import Tensor, nn

from medlite.bench.benchmark import BenchmarkResult, benchmark
from medlite.bench.lane import Candidate
from medlite.errors import BenchmarkError
from medlite.export.export import export_all
from medlite.types import Artifact, BenchmarkSettings, Hardware, Runtime

Source = nn.Module | Mapping[str, Artifact]
"""What to measure: a network, or its artifacts by format."""


class BenchmarkCallback(lightning.Callback):
    """Exports the trained network and measures it on the images of the test or validation loader.

        trainer = lightning.Trainer(callbacks=[BenchmarkCallback(runtimes=[OnnxRuntime()])])
        trainer.test(module, loader)

    Every number goes to the trainer's loggers under its name; `result` holds everything. With
    several processes only the first one measures.

    Args:
        runtimes: engines to measure on.
        hardware: threads, cores and memory of the measuring processes.
        settings: how often and how long.
        artifacts: what to measure, by format, where it is exported already; otherwise the network
            of the LightningModule is exported.
        baseline: what to time in turns with it, for the speed-up: a network or its artifacts.
        net: the attribute of the LightningModule that holds the network; the LightningModule
            itself where it has none of that name.
        when: after "test", or after "fit" on the validation images.
        max_images: use only so many; None takes all.
        directory: for artifacts and job files; by default `benchmark` under the trainer's root.
    """

    result: BenchmarkResult | None = None

    def __init__(
        self,
        *,
        runtimes: Sequence[Runtime],
        hardware: Hardware | None = None,
        settings: BenchmarkSettings | None = None,
        artifacts: Mapping[str, Artifact] | None = None,
        baseline: Source | None = None,
        net: str = "net",
        when: Literal["test", "fit"] = "test",
        max_images: int | None = None,
        directory: Path | None = None,
    ) -> None:
        self.runtimes = runtimes
        self.hardware = hardware or Hardware()
        self.settings = settings or BenchmarkSettings()
        self.artifacts = artifacts
        self.baseline = baseline
        self.net = net
        self.when = when
        self.max_images = max_images
        self.directory = directory

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure on the test images."""
        if self.when == "test":
            self._run(trainer, pl_module, trainer.test_dataloaders)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure on the validation images."""
        if self.when == "fit":
            self._run(trainer, pl_module, trainer.val_dataloaders)

    def _run(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loaders: Any
    ) -> None:
        if not trainer.is_global_zero:
            return
        directory = self.directory or Path(trainer.default_root_dir) / "benchmark"
        images = gather_images(loaders, self.max_images)
        self.result = benchmark(
            self._candidates(pl_module, images.shape[1:], directory),
            hardware=self.hardware,
            settings=self.settings,
            images=images,
            directory=directory,
        )
        values = {m.name: m.value for m in self.result.measurements if m.value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _candidates(
        self, pl_module: nn.Module, input_shape: tuple[int, ...], directory: Path
    ) -> list[Candidate]:
        net = getattr(pl_module, self.net, pl_module)
        sources = {"": net if self.artifacts is None else self.artifacts}
        if self.baseline is not None:
            sources["baseline"] = self.baseline
        formats = sorted({runtime.format for runtime in self.runtimes})
        artifacts = {
            name: _artifacts(source, formats, input_shape, directory, stem=name or "model")
            for name, source in sources.items()
        }
        return [
            Candidate(name=name, runtime=runtime, artifact=artifacts[name][runtime.format])
            for name in sources
            for runtime in self.runtimes
        ]


def gather_images(loaders: Any, max_images: int | None = None) -> np.ndarray:
    """The images of a loader, or of several in a list or dictionary, one after another.

    A batch is a tensor of images, a tuple that begins with one (such as `Batch` or (x, y)), or a
    dictionary that holds one under "image".

    Returns:
        (N, C, H, W[, D]) float32, at most `max_images`.

    Raises:
        BenchmarkError: there is no image, or a batch of another form.
    """
    gathered: list[np.ndarray] = []
    num_images = 0
    for batch in _batches(loaders):
        if max_images is not None and num_images >= max_images:
            break
        images = _images_of(batch).detach().cpu().float().numpy()
        gathered.append(images)
        num_images += len(images)
    if not gathered:
        message = "BenchmarkCallback found no images: the trainer has no such loader"
        raise BenchmarkError(message)
    return np.concatenate(gathered)[:max_images]


def _batches(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        if loader is not None:  # not its truth, which would ask for a length
            yield from loader


def _images_of(batch: Any) -> Tensor:
    candidate = batch.get("image") if isinstance(batch, Mapping) else batch
    if isinstance(candidate, tuple | list) and candidate:
        candidate = candidate[0]
    if not isinstance(candidate, Tensor):
        message = (
            f"BenchmarkCallback cannot find the images in a batch of type {type(batch).__name__}: "
            'give tensors, tuples that begin with images, or dictionaries with the key "image"'
        )
        raise BenchmarkError(message)
    return candidate


def _artifacts(
    source: Source, formats: Sequence[str], input_shape: tuple[int, ...], directory: Path, stem: str
) -> Mapping[str, Artifact]:
    if isinstance(source, nn.Module):
        return export_all(
            source, formats=formats, input_shape=input_shape, directory=directory, stem=stem
        )
    for format in formats:
        if format not in source:
            message = (
                f"a runtime loads the format {format!r}, but {stem} was exported as "
                f"{', '.join(source) or 'nothing'}"
            )
            raise BenchmarkError(message)
    return source
