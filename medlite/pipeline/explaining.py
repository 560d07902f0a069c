"""Part of stage `bench`: what the decisions of both models rest on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from medlite.bench.benchmark import BenchmarkResult
from medlite.config import digest
from medlite.pipeline.job import Job
from medlite.pipeline.kept import read_kept, write_kept
from medlite.pipeline.robustness import spread_positions
from medlite.pipeline.sessions import open_sessions
from medlite.safety.agreement import Agreement, compare_maps, mean_correlation
from medlite.safety.saliency import (
    grad_cam,
    integrated_gradients,
    methods_of,
    occlusion,
    rollout,
    score_weights,
    scored,
)
from medlite.safety.saliency_graph import as_graph, redrawn
from medlite.types import Artifact

_log = logging.getLogger(__name__)

NUM_REDRAWN = 4
"""images of the check with weights in another order"""

NUM_PICTURES = 4

PICTURES = "explanations.npz"

WHY_NONE = {
    "grad_cam": "no feature map: after its patches the network works on tokens",
    "rollout": "not all layers attend to the same tokens of the image",
}

Maps = list[np.ndarray]

Found = Iterator[tuple[Agreement, dict[str, Maps]]]
"""a row, and its maps "before" and "after" """


@dataclass(frozen=True, kw_only=True)
class Cases:
    """The images that are explained, what is explained of each, and where its finding is."""

    images: list[Tensor]
    weights: list[Tensor]
    regions: list[np.ndarray | None]
    groups: list[str]

    def first(self, count: int) -> Cases:
        """The first few."""
        return Cases(
            images=self.images[:count],
            weights=self.weights[:count],
            regions=self.regions[:count],
            groups=self.groups[:count],
        )


@dataclass(frozen=True, kw_only=True)
class Explained:
    """Everything that the methods look at.

    graphs: "" (deployed) and "baseline" -> the net as `as_graph` gives it.
    candidates: those of the benchmark, such as "baseline/openvino".
    """

    job: Job
    cases: Cases
    graphs: Mapping[str, GraphModule]
    artifacts: Mapping[str, Mapping[str, Artifact]]
    candidates: tuple[str, ...]

    @property
    def uncompressed(self) -> GraphModule:
        """What the check with random weights is made of."""
        return self.graphs.get("baseline", self.graphs[""])


def explain(
    job: Job,
    nets: Mapping[str, nn.Module],
    artifacts: Mapping[str, Mapping[str, Artifact]],
    bench: BenchmarkResult,
    key: str,
) -> dict[str, Any]:
    """Rows of `Agreement` and pictures, kept in the run directory; empty where switched off.

    Occlusion asks the deployed artifacts in their runtimes. The other methods need gradients or
    inner values, which artifacts do not give: they look at the nets in torch.
    """
    config = job.config
    if not config.explainability.enabled:
        return {}
    path = config.directory / "bench" / "explanations.json"
    made_of = [asdict(config.explainability), config.safety.num_resamples, asdict(config.hardware)]
    key = digest([key, config.runtime, config.seed, *made_of])
    kept = read_kept(path, key)
    if kept is not None and (config.directory / PICTURES).exists():
        return kept
    cases = _choose(job, nets.get("baseline", nets[""]))
    _log.info("explainability: %d images", len(cases.images))
    everything = Explained(
        job=job,
        cases=cases,
        graphs={name: as_graph(net, job.spec.input_shape) for name, net in nets.items()},
        artifacts=artifacts,
        candidates=tuple(bench.predictions),
    )
    rows, pictures = [], dict[str, Maps]()
    for method in methods_of(config.explainability):
        found = _occlude(everything) if method == "occlusion" else _look(everything, method)
        for row, maps in found:
            rows.append(asdict(row))
            pictures |= {f"{row.method}/{row.where}/{side}": each for side, each in maps.items()}
    _write_pictures(config.directory / PICTURES, cases, pictures)
    report = {
        "num_images": len(cases.images),
        "num_groups": len(set(cases.groups)),
        "group_kind": job.spec.group_kind,
        "rows": rows,
        "pictures": PICTURES,
    }
    write_kept(path, key, report)
    return report


@torch.no_grad()
def _choose(job: Job, reference: nn.Module) -> Cases:
    """Images spread over the test split; what the uncompressed model decided is explained."""
    split = job.data.data.test
    positions = spread_positions(len(split.groups), job.config.explainability.num_images)
    samples = [split.samples[position] for position in positions]
    images = [torch.from_numpy(np.ascontiguousarray(image))[None] for image, _ in samples]
    if job.spec.task == "segmentation":
        regions: list[np.ndarray | None] = [target > 0 for _, target in samples]
    else:
        known = split.regions
        regions = [None if known is None else known[position] for position in positions]
    weights = [
        score_weights(reference(image)[0].float(), target, job.spec)
        for image, (_, target) in zip(images, samples, strict=True)
    ]
    groups = [split.groups[position] for position in positions]
    return Cases(images=images, weights=weights, regions=regions, groups=groups)


def _occlude(everything: Explained) -> Found:
    """Every runtime's own models; the check is of the uncompressed net in torch."""
    cases, maps = everything.cases, {}
    check = _check("occlusion", everything)
    with open_sessions(everything.job, everything.artifacts, everything.candidates) as sessions:
        for candidate, session in sessions.items():
            maps[candidate] = [
                occlusion(scored(_answer(session), weights), image)
                for image, weights in zip(cases.images, cases.weights, strict=True)
            ]
    for where, after in maps.items():
        if "/" not in where:
            sides = {"before": maps.get(f"baseline/{where}"), "after": after}
            yield _agreement(everything, "occlusion", where, sides, check)


def _look(everything: Explained, method: str) -> Found:
    """Into the nets in torch, as graphs."""
    maps = {
        name: _maps(method, graph, everything.cases) for name, graph in everything.graphs.items()
    }
    if any(each is None for each in maps.values()):
        note = WHY_NONE[method]
        yield Agreement(method=method, where="torch", num_images=0, note=note), {}
        return
    sides = {"before": maps.get("baseline"), "after": maps[""]}
    yield _agreement(everything, method, "torch", sides, _check(method, everything))


def _agreement(
    everything: Explained,
    method: str,
    where: str,
    sides: Mapping[str, Maps | None],
    check: float | None,
) -> tuple[Agreement, dict[str, Maps]]:
    after, config = sides["after"], everything.job.config
    assert after is not None
    row = compare_maps(
        sides["before"],
        after,
        everything.cases.regions,
        method=method,
        where=where,
        groups=everything.cases.groups,
        randomised_correlation=check,
        num_resamples=config.safety.num_resamples,
        seed=config.seed,
    )
    return row, {side: maps for side, maps in sides.items() if maps is not None}


def _maps(method: str, graph: GraphModule, cases: Cases) -> Maps | None:
    """The maps of all images by a method that looks inside; None where the net has none."""
    found = []
    for image, weights in zip(cases.images, cases.weights, strict=True):
        if method == "grad_cam":
            saliency = grad_cam(graph, weights, image)
        elif method == "rollout":
            saliency = rollout(graph, image)
        elif method == "occlusion":
            with torch.no_grad():
                saliency = occlusion(scored(graph, weights), image)
        else:
            saliency = integrated_gradients(scored(graph, weights), image)
        if saliency is None:
            return None
        found.append(saliency)
    return found


def _check(method: str, everything: Explained) -> float | None:
    """Model randomisation (Adebayo et al., "Sanity Checks for Saliency Maps", arXiv:1810.03292).

    The correlation of the maps with those of the same net, its weights in another order.
    """
    few, learnt = everything.cases.first(NUM_REDRAWN), everything.uncompressed
    drawn = redrawn(learnt, everything.job.config.seed)
    first, second = (_maps(method, graph, few) for graph in (learnt, drawn))
    if first is None or second is None:
        return None
    correlation = mean_correlation(first, second)
    return correlation if np.isfinite(correlation) else None


def _answer(session: Any) -> Any:
    """A session as a function of tensors."""
    return lambda images: torch.from_numpy(
        np.concatenate([session(image[None]) for image in images.numpy()])
    )


def _write_pictures(path: Path, cases: Cases, maps: Mapping[str, Sequence[np.ndarray]]) -> None:
    """A few images with every map of theirs; of a volume the middle slice."""

    def flat(array: np.ndarray, num_axes: int) -> np.ndarray:
        return array[..., array.shape[-1] // 2] if array.ndim > num_axes else array

    arrays = {
        name: np.stack([flat(each, 2) for each in found[:NUM_PICTURES]]).astype(np.float32)
        for name, found in maps.items()
    }
    images = np.stack([flat(image[0].numpy(), 3) for image in cases.images[:NUM_PICTURES]])
    np.savez_compressed(path, images=images, **arrays)  # type: ignore[arg-type]
