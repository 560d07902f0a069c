"""The stages of a run as W&B artifacts, each linked to the one that it was made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def log_lineage(
    run: Any, lineage: Sequence[Mapping[str, Any]], weights: Mapping[str, Path]
) -> None:
    """Log the weights of every stage; what the stage left is the artifact's metadata.

    Two runs that share a stage share its artifact, since name and content are the same. Each
    artifact names the one before it in its metadata. Online, it is an input of the run as well,
    so that W&B draws the chain; an offline run cannot say so (it takes an answer of the server).

    Args:
        run: an active W&B run.
        lineage: the rows of the record, in order.
        weights: the store's file of each row's key; rows without one are left out.
    """
    import wandb

    parent = None
    for row in lineage:
        if row["key"] not in weights:
            continue
        made_of = {"parent": parent.name if parent is not None else None}
        artifact = wandb.Artifact(
            artifact_name(row["key"]), type="stage", metadata={**row, **made_of}
        )
        # The store never changes a file, so there is no need for a second copy of it.
        artifact.add_file(str(weights[row["key"]]), name="weights.pt", policy="immutable")
        if parent is not None and not run.offline:
            run.use_artifact(parent.wait())
        parent = run.log_artifact(artifact)


def artifact_name(key: str) -> str:
    """A store's key in the letters that W&B takes.

    >>> artifact_name("phantom-unet+prune-0a1b2c")
    'stage-phantom-unet.prune-0a1b2c'
    """
    return "stage-" + re.sub(r"[^\w.-]", ".", key)
