"""The latency of a net that a compression step considers, on the first runtime of the job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import nn

from medlite.bench import latency
from medlite.bench.benchmark import NOT_ON_TARGET
from medlite.bench.lane import Candidate, Lane
from medlite.config import digest
from medlite.export.export import export
from medlite.types import Artifact, BenchmarkSettings, Hardware, Runtime

MOST_QUERIES = 60
"""of each net: the median of so few is good enough to choose by; the benchmark comes later"""


@dataclass(frozen=True, kw_only=True)
class StepLatency:
    """Times nets in fresh processes, in turns with the net that the step was given.

    What it found is kept, so that a step that is started again after a kill decides as before:
    its fits then go on from their checkpoints.

    Args:
        runtime: the engine.
        hardware: threads, cores and memory of the processes.
        settings: the job's; of its queries only a few are made.
        image: (1, C, H, W[, D]) float32, a real one.
        reference: the net that the step was given.
        directory: for exports and what was found; it may go when the step is done.
    """

    runtime: Runtime
    hardware: Hardware
    settings: BenchmarkSettings
    image: np.ndarray
    reference: nn.Module
    directory: Path

    @property
    def where(self) -> str:
        """The runtime and the hardware, in words."""
        place = f"{self.runtime.name} ({self.hardware.name})"
        return place if self.hardware.is_this_machine else f"{place}, {NOT_ON_TARGET}"

    def __call__(self, net: nn.Module) -> float:
        """The median time of one image in milliseconds.

        What other nets are timed at is their ratio to the reference, timed in turns with them,
        so that a machine that is slower for a while makes no net look slower.

        Raises:
            BenchmarkError: the runtime cannot load the net, or its process failed.
            ExportError: the runtime's format cannot hold the net.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "found_ms.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        whole, key = _look(self.reference), _look(net)
        if key not in found:
            medians = self._medians(net if key != whole else None)
            found.setdefault(whole, medians[0])
            found[key] = found[whole] * medians[-1] / medians[0]
            _write(path, found)
        return found[key]

    @cached_property
    def _reference_artifact(self) -> Artifact:
        return self._export(self.reference, self.directory)

    def _export(self, net: nn.Module, directory: Path) -> Artifact:
        return export(
            net,
            format=self.runtime.format,
            input_shape=self.image.shape[1:],
            directory=directory,
            stem="net",
        )

    def _medians(self, net: nn.Module | None) -> list[float]:
        """Of the reference and, where there is another net, of that."""
        settings = replace(
            self.settings, num_queries=min(self.settings.num_queries, MOST_QUERIES), batch_size=1
        )
        with TemporaryDirectory(dir=self.directory) as name:
            directory = Path(name)
            np.save(directory / "image.npy", self.image)
            artifacts = [self._reference_artifact]
            if net is not None:
                artifacts.append(self._export(net, directory))
            lanes = [
                Lane(
                    Candidate(artifact=artifact, runtime=self.runtime, name=f"net{index}"),
                    hardware=self.hardware,
                    settings=settings,
                    images=directory / "image.npy",
                    directory=directory,
                    runtime_only_kib={},
                )
                for index, artifact in enumerate(artifacts)
            ]
            return _time_in_turns(lanes, settings)


def _time_in_turns(lanes: list[Lane], settings: BenchmarkSettings) -> list[float]:
    try:
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.warm_up()
        for num_queries in latency.round_sizes(settings):
            for lane in lanes:
                lane.time_round(num_queries)
    finally:
        for lane in lanes:
            lane.close()
    return [float(np.median(lane.timing.samples_ms)) for lane in lanes]


def _look(net: nn.Module) -> str:
    """What the latency depends on: the shapes of all tensors."""
    return digest({name: list(tensor.shape) for name, tensor in net.state_dict().items()})


def _write(path: Path, found: Mapping[str, float]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.replace(path)
