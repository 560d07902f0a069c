"""Part of stage `report`: do the exported models say what torch says, and if not, why?"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medlite.export.divergence import READABLE_FORMATS, first_divergence
from medlite.export.parity import check_parity
from medlite.metrics.task import build_metrics, primary_metric
from medlite.pipeline.job import Job
from medlite.pipeline.measuring import Artifacts, predict, split_key
from medlite.report.environment import cuts_off_int8_sums
from medlite.types import Artifact, DataSpec, Predictions

_log = logging.getLogger(__name__)

LARGEST_SAFE_CODE = 64
"""of a weight: two of its products with 255 fit in 16 bits"""

SMALL_CHANGE = 1e-4
"""of every value of the image: far less than a grey level of an 8-bit image"""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was exported, of what, and what torch says of it.

    nets, torch_says: "" (the deployed one), "baseline".
    """

    job: Job
    nets: Mapping[str, nn.Module]
    artifacts: Artifacts
    torch_says: Mapping[str, Predictions]


def compare_with_torch(
    exported: Exported, predictions: Mapping[str, Predictions]
) -> list[dict[str, Any]]:
    """A row for each candidate of `predictions`, such as "baseline/openvino"."""
    job, rows, causes = exported.job, [], dict[tuple[str, str], tuple[str, ...]]()
    for key, said in predictions.items():
        name, runtime = split_key(key)
        artifact = exported.artifacts[name][job.runtimes[runtime].format]
        parity = check_parity(
            exported.torch_says[name].logits,
            said.logits,
            labels=job.spec.labels,
            precision=artifact.precision,
            metric=partial(_primary_score, job.spec, said.targets),
        )
        rows.append({"candidate": key, **asdict(parity), "passed": parity.passed})
        if not parity.passed:
            if (name, artifact.precision) not in causes:  # the same on every runtime
                causes[name, artifact.precision] = tuple(_known_causes(exported, name, artifact))
            rows[-1]["reasons"] = (*parity.reasons, *causes[name, artifact.precision])
            rows[-1]["first_divergence"] = _find_divergence(exported, name, artifact)
            _log.warning("parity of %s is broken: %s", key, "; ".join(rows[-1]["reasons"]))
    return rows


def _known_causes(exported: Exported, name: str, artifact: Artifact) -> Iterator[str]:
    """What may be behind a difference of integers, besides the runtime itself."""
    if artifact.precision != "int8":
        return
    job, net = exported.job, exported.nets[name]
    integers = [each for each in net.state_dict().values() if each.dtype == torch.int8]
    if cuts_off_int8_sums() and any(
        each.int().abs().max() > LARGEST_SAFE_CODE for each in integers
    ):
        yield (
            "this processor has no VNNI, so its 8-bit kernels cut off sums of products with 8-bit "
            "weights; set weight_bits=7 (compression=ptq, qat or selective_ptq)"
        )
    said = exported.torch_says[name]
    nearby = check_parity(
        said.logits,
        predict(job, _SlightlyChanged(net)).logits,
        labels=job.spec.labels,
        precision=artifact.precision,
    )
    yield (
        f"in torch alone, {nearby.num_flips:,} of {nearby.num_decisions:,} decisions flip where "
        f"every value of the image grows by {SMALL_CHANGE:.2%}"
    )


class _SlightlyChanged(nn.Module):
    """A net that sees each image a little stronger than it is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the changed image, (B, C, H, W[, D]) -> (B, K[, H, W, D])."""
        logits: Tensor = self.net(image * (1 + SMALL_CHANGE))
        return logits


def _find_divergence(exported: Exported, name: str, artifact: Artifact) -> str:
    if artifact.format not in READABLE_FORMATS:
        return f"files of the format '{artifact.format}' do not show their inner tensors"
    images = exported.job.data.test_images(4).numpy()
    found = first_divergence(exported.nets[name], artifact, images)
    return str(found) if found is not None else "no layer differs on four images of the test split"


def _primary_score(spec: DataSpec, targets: np.ndarray, logits: np.ndarray) -> float:
    """The task metric of logits on the test split."""
    metrics = build_metrics(spec)
    metrics.update(torch.from_numpy(logits), torch.from_numpy(targets))
    return float(metrics.compute()[primary_metric(spec)])
