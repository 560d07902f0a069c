"""Models that are right as often as a test wants."""

import numpy as np

from medlite.safety_settings import SafetyMargins
from medlite.types import DataSpec, Predictions

MARGINS = SafetyMargins(num_resamples=1000)


def make_spec(task="classification", labels="multiclass", class_counts=(500, 400, 300, 20)):
    num_names = len(class_counts)
    return DataSpec(
        name="fake", task=task, labels=labels, in_channels=1,
        num_classes=1 if labels == "binary" else num_names, image_size=(8, 8),
        class_names=tuple(f"Class {i}" for i in range(num_names)), class_counts=class_counts,
        num_samples={}, num_groups={}, group_kind="patient", modality="shape",
        provenance="random", origin="none", preprocessing="none",
    )  # fmt: skip


def make_classes(per_class=(300, 300, 300, 100), skill=2.5, seed=0):
    generator = np.random.default_rng(seed)
    targets = np.repeat(np.arange(len(per_class)), per_class)
    logits = generator.normal(size=(len(targets), len(per_class)))
    logits[np.arange(len(targets)), targets] += skill
    groups = tuple(f"p{i}" for i in range(len(targets)))
    return Predictions(logits=logits.astype(np.float32), targets=targets, groups=groups)


def with_logits(predictions, logits):
    return Predictions(
        logits=logits.astype(np.float32), targets=predictions.targets, groups=predictions.groups
    )


def slightly_changed(predictions, size=1e-3, seed=1):
    noise = np.random.default_rng(seed).normal(size=predictions.logits.shape)
    return with_logits(predictions, predictions.logits + size * noise)


def items_of(report):
    return {item.name: item for item in report.items}


def make_masks(num_images=40, seed=0):
    generator = np.random.default_rng(seed)
    targets = np.zeros((num_images, 8, 8), dtype=np.int64)
    for image in targets:
        row, column = generator.integers(0, 4, size=2)
        image[row : row + 4, column : column + 4] = 1
    logits = np.where(targets == 1, 2.0, -2.0) + generator.normal(size=targets.shape)
    groups = tuple(f"p{i // 2}" for i in range(num_images))
    return Predictions(logits=logits[:, None].astype(np.float32), targets=targets, groups=groups)
