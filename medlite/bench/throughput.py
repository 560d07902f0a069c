"""Images per second when there is always another batch: measured, never 1 / latency."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medlite.bench.percentiles import round_interval
from medlite.types import Measurement


def summarise(
    prefix: str, runtime: str, batch_seconds: Sequence[float], batch_size: int
) -> Measurement:
    """Images over seconds of all batches, with a bootstrap interval over the batches.

    Args:
        prefix: "" or "baseline/", before the name.
        runtime: the runtime's name, inside the name.
        batch_seconds: duration of each batch, at least three.
        batch_size: images in each.
    """

    def images_per_second(seconds: np.ndarray) -> float:
        return float(batch_size / np.mean(seconds))

    return Measurement(
        name=f"{prefix}throughput/{runtime}/images_per_s",
        value=images_per_second(np.asarray(batch_seconds)),
        unit="images/s",
        n=len(batch_seconds) * batch_size,
        spread=round_interval(images_per_second, [[seconds] for seconds in batch_seconds]),
        higher_is_better=True,
        note=f"offline, batches of {batch_size}",
    )
