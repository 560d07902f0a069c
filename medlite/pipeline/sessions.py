"""Every model of a job in its own runtime, in this process: for outputs, not for timing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from medlite.pipeline.job import Job
from medlite.types import Artifact, InferenceSession


@contextmanager
def open_sessions(
    job: Job, artifacts: Mapping[str, Mapping[str, Artifact]], candidates: Iterable[str]
) -> Iterator[dict[str, InferenceSession]]:
    """Candidate, such as "baseline/openvino" -> its session.

    The torch runtime sets the threads of its process, which here is the job's: they are set back.
    """
    num_threads = torch.get_num_threads()
    try:
        yield {key: _load(job, artifacts, key) for key in candidates}
    finally:
        torch.set_num_threads(num_threads)


def answer_one_by_one(session: InferenceSession, images: Iterable[np.ndarray]) -> np.ndarray:
    """Logits (N, K, ...) of images (C, H, W[, D]), one at a time as models are deployed."""
    return np.concatenate([session(image[None]) for image in images])


def _load(job: Job, artifacts: Mapping[str, Mapping[str, Artifact]], key: str) -> InferenceSession:
    name, _, runtime_name = key.rpartition("/")
    runtime = job.runtimes[runtime_name]
    return runtime.load(artifacts[name][runtime.format], job.config.hardware)
