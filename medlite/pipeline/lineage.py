"""What each stage left: size, cost, and what torch says of the test split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from medlite.export.layer_costs import count_layers, total
from medlite.metrics.statistics import grouped_scores
from medlite.metrics.task import primary_metric
from medlite.pipeline.job import Job
from medlite.pipeline.measuring import predict
from medlite.pipeline.training import Trained
from medlite.types import Predictions


def trace_lineage(
    job: Job, stages: Mapping[str, Trained], known: Mapping[nn.Module, Predictions]
) -> list[dict[str, Any]]:
    """One row a stage, in order; what a stage changed is the difference to the row before it.

    Nets of `known` were asked already.

    `scores` are those of torch on the test split: the task metric, calibration, and the
    sensitivity of each class, without intervals; empty where an output is not finite.
    `weight_bytes` and `sha256` are of all tensors of the state, `seconds` of this stage alone.
    """
    return [
        {"stage": name, **_row(job, trained, known), "seconds": list(trained.seconds.values())[-1]}
        for name, trained in stages.items()
    ]


def describe_teacher(job: Job, teacher: Trained, said: Predictions) -> dict[str, Any]:
    """The same of the net that a step learned from; several are one, their mean."""
    return {"name": teacher.name, **_row(job, teacher, {teacher.net: said})}


def _row(job: Job, trained: Trained, known: Mapping[nn.Module, Predictions]) -> dict[str, Any]:
    cost = total(count_layers(trained.net, job.spec.input_shape))
    tensors = _tensors(trained.net)
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return {
        "key": trained.key,
        "sha256": digest.hexdigest(),
        "params": cost.params,
        "macs": cost.macs,
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "scores": _scores(job, known.get(trained.net) or predict(job, trained.net)),
    }


def _scores(job: Job, said: Predictions) -> dict[str, float | None]:
    if not np.isfinite(said.logits).all():
        return {}
    kept = (primary_metric(job.spec), "ece", "nll")
    scores = grouped_scores(said, job.spec)
    names = [n for n in scores.statistics if n in kept or n.startswith("sensitivity/")]
    values = {name: scores.value(name) for name in names}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _tensors(net: nn.Module) -> list[Tensor]:
    return [tensor.detach().cpu().contiguous() for tensor in net.state_dict().values()]
