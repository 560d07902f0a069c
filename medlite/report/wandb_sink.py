"""Send a finished run to Weights & Biases, offline or online.

Nothing that identifies a patient goes there: no file names, no ids, no paths of the dataset.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medlite.metrics.decisions import decisions
from medlite.report.examples import Examples, as_rgb, read_examples
from medlite.report.explanation_section import read_heat
from medlite.report.gallery import named
from medlite.report.result import FILE_NAME, RunResult
from medlite.report.wandb_lineage import log_lineage

if TYPE_CHECKING:
    from collections.abc import Mapping


def log_to_wandb(
    run: Any, result: RunResult, run_directory: Path, weights: Mapping[str, Path]
) -> None:
    """Add summary, card, example predictions, the lineage and artifacts to an active run.

    The caller starts and finishes the run and gives it its configuration, through
    `redact_paths`.

    Args:
        run: what `wandb.init` returned.
        result: as written to `run_directory`.
        run_directory: where result.json, the examples and the exported models are.
        weights: the file of each stage of the lineage, by the stage's key.

    Raises:
        RecordError: the examples cannot be read.
    """
    run.summary.update(summary_of(result))
    logged: dict[str, Any] = {"card": card_table(result)}
    if result.examples is not None:
        examples = read_examples(run_directory / result.examples)
        logged["examples"] = example_images(examples, result.dataset)
    for name, file in case_pictures(result).items():
        if (run_directory / file).exists():
            logged[name] = example_images(read_examples(run_directory / file), result.dataset)
    pictures = result.explanations.get("pictures")
    if pictures is not None and (run_directory / pictures).exists():
        logged |= saliency_images(run_directory / pictures)
    run.log(logged)
    log_lineage(run, result.lineage, weights)
    log_files(run, result, run_directory)


def case_pictures(result: RunResult) -> dict[str, str]:
    """Key -> the npz of pictures of exemplars and failures in the run directory."""
    files = {f"exemplars/{key}": report["pictures"] for key, report in result.exemplars.items()}
    for runtime, report in result.failure_modes.items():
        for kind in ("worst", "changed"):
            files[f"failures/{runtime}/{kind}"] = report[f"{kind}_pictures"]
    return {name: file for name, file in files.items() if file is not None}


def summary_of(result: RunResult) -> dict[str, Any]:
    """Every measured value and every loss of the gate under its flat key, and the verdicts."""
    values: dict[str, Any] = {
        measurement.name: measurement.value
        for measurement in result.measurements
        if measurement.value is not None
    }
    values |= losses_of(result)
    verdicts = {name: result.verdict[name] for name in ("safety", "parity", "summary")}
    return values | {f"verdict/{name}": value for name, value in verdicts.items()}


def losses_of(result: RunResult) -> dict[str, float | str]:
    """`safety/<runtime>/<loss>[/<class>]`, and the verdict of each judged one."""
    values: dict[str, float | str] = {}
    for runtime, report in result.safety.items():
        for item in (*report["items"], *report.get("shown", ())):
            name = f"{runtime}/{item['name'].removeprefix('safety/')}"
            if item["difference"] is not None:
                values[f"safety/{name}"] = item["difference"]
            if "verdict" in item:
                values[f"verdict/safety/{name}"] = item["verdict"]
    return values


def card_table(result: RunResult) -> Any:
    """The deployment card, a row a field."""
    import wandb

    rows = [
        [category.title, row.label, row.value, row.provenance, row.note]
        for category in result.card
        for row in category.fields
    ]
    return wandb.Table(columns=["category", "field", "value", "provenance", "note"], data=rows)


def example_images(examples: Examples, dataset: Mapping[str, Any]) -> list[Any]:
    """Images with their masks, or with their true and predicted classes as captions."""
    import wandb

    is_segmentation = dataset["task"] == "segmentation"
    decided = {
        candidate: decisions(torch.from_numpy(logits), dataset["labels"]).numpy()
        for candidate, logits in examples.logits.items()
    }
    images = []
    for position, pixels in enumerate(examples.images):
        truth = examples.targets[position]
        said = {candidate: each[position] for candidate, each in decided.items()}
        details = masks(truth, said, dataset) if is_segmentation else caption(truth, said, dataset)
        images.append(wandb.Image(as_rgb(pixels), **details))
    return images


def saliency_images(path: Path) -> dict[str, list[Any]]:
    """Key of each method -> a few images with what is salient in colour."""
    import wandb

    return {
        f"explainability/{name}": [wandb.Image(each) for each in pictures]
        for name, pictures in read_heat(path).items()
    }


def masks(
    truth: np.ndarray, said: Mapping[str, np.ndarray], dataset: Mapping[str, Any]
) -> dict[str, Any]:
    """The annotation and every candidate's mask, which W&B lets a reader switch."""
    labels = dict(enumerate(dataset["class_names"]))
    layers = {"annotation": truth, **said}
    return {
        "masks": {
            name.replace("/", "-"): {"mask_data": mask.astype(np.uint8), "class_labels": labels}
            for name, mask in layers.items()
        }
    }


def caption(
    truth: np.ndarray, said: Mapping[str, np.ndarray], dataset: Mapping[str, Any]
) -> dict[str, Any]:
    """What is true and what every candidate says."""
    names, labels = dataset["class_names"], dataset["labels"]
    parts = [f"true: {named(truth, names, labels)}"]
    parts += [f"{candidate}: {named(each, names, labels)}" for candidate, each in said.items()]
    return {"caption": "; ".join(parts)}


def log_files(run: Any, result: RunResult, run_directory: Path) -> None:
    """result.json, and the exported models with what must stand beside them."""
    import wandb

    record = wandb.Artifact(f"result-{run.id}", type="result")
    record.add_file(str(run_directory / FILE_NAME))
    run.log_artifact(record)
    if not result.artifacts:
        return
    models = wandb.Artifact(f"models-{run.id}", type="model")
    for file in sorted({file for artifact in result.artifacts for file in artifact["files"]}):
        models.add_file(str(run_directory / file), name=file)
    run.log_artifact(models)
