"""Procedural images that a small network learns in seconds: for tests, never for claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medlite.data.image_data import SPLITS, ArraySamples, ImageData, ImageSplit, sides_of
from medlite.errors import ConfigError
from medlite.types import DataSpec, Labels, Task

_RARE_SHARE = 0.1
_NOISE_SD = 0.15


def phantom(
    *,
    task: Task = "segmentation",
    labels: Labels = "binary",
    num_classes: int = 1,
    image_size: int | Sequence[int] = (32, 32),
    in_channels: int = 1,
    num_train: int = 64,
    num_val: int = 16,
    num_test: int = 32,
    images_per_patient: int = 2,
    seed: int = 0,
) -> ImageData:
    """Bright and dark ellipsoids ("lesions") on each patient's own noisy background.

    A lesion's kind is its brightness. In segmentation class 0 is the background and every
    other class one kind; in multi-class and binary classification class 0 has no lesion; in
    multi-label classification every class is one kind, present or absent. The last class is
    rare (a tenth of the patients, at least one in each split). All images of a patient hold
    the same kinds.

    Args:
        task: "segmentation" or "classification".
        labels: "binary" (one logit), "multiclass", or for classification "multilabel".
        num_classes: number of logits K.
        image_size: (H, W) or (H, W, D), sides of 8 and more; a number alone means a square.
        in_channels: channels C, each with its own noise.
        num_train: training images.
        num_val: validation images.
        num_test: test images.
        images_per_patient: images that share a group id.
        seed: other seeds give other patients.

    Raises:
        ConfigError: arguments that do not go together.
    """
    image_size = sides_of(image_size)
    num_images = dict(zip(SPLITS, (num_train, num_val, num_test), strict=True))
    least = min(*num_images.values(), in_channels, images_per_patient)
    _check(task, labels, num_classes, image_size, least)
    has_background_class = labels == "multiclass"
    cohort = _Cohort(
        task=task,
        labels=labels,
        num_kinds=num_classes - has_background_class,
        image_size=image_size,
        in_channels=in_channels,
        images_per_patient=images_per_patient,
        seed=seed,
    )
    train, val, test = (cohort.build_split(name, num_images[name]) for name in SPLITS)
    spec = _spec(cohort, num_classes, {"train": train, "val": val, "test": test})
    return ImageData(spec=spec, train=train, val=val, test=test)


def _check(
    task: str, labels: str, num_classes: int, image_size: tuple[int, ...], least: int
) -> None:
    problems = []
    if least < 1:
        problems.append(
            "dataset.num_train, num_val, num_test, in_channels and images_per_patient: "
            f"{least} is less than 1"
        )
    if task not in ("segmentation", "classification"):
        problems.append(f"dataset.task: {task!r} is not segmentation or classification")
    if labels not in ("binary", "multiclass", "multilabel"):
        problems.append(f"dataset.labels: {labels!r} is not binary, multiclass or multilabel")
    if (task, labels) == ("segmentation", "multilabel"):
        problems.append("dataset.labels: segmentation is binary or multiclass, not multilabel")
    if (labels == "binary") != (num_classes == 1):
        problems.append(
            f"dataset.num_classes: {num_classes} does not go with labels={labels}; "
            "binary has 1 logit, the others 2 and more"
        )
    if len(image_size) not in (2, 3) or min(image_size) < 8:
        problems.append(
            f"dataset.image_size: {list(image_size)} is not (H, W) or (H, W, D) with sides >= 8"
        )
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class _Cohort:
    """How the patients of all splits are made; arguments as in `phantom`."""

    task: Task
    labels: Labels
    num_kinds: int
    image_size: tuple[int, ...]
    in_channels: int
    images_per_patient: int
    seed: int

    def build_split(self, name: str, num_images: int) -> ImageSplit:
        kinds = self.kinds_of_patients(-(-num_images // self.images_per_patient))
        images, targets, groups, regions = [], [], [], []
        for position in range(num_images):
            patient = position // self.images_per_patient
            random = np.random.default_rng((self.seed, *name.encode(), position, 0))
            patient_random = np.random.default_rng((self.seed, *name.encode(), patient, 1))
            mask = self.draw_mask(kinds[patient], random)
            images.append(self.draw_image(mask, patient_random, random))
            targets.append(mask if self.task == "segmentation" else self.label(kinds[patient]))
            groups.append(f"{name}-{patient:04d}")
            regions.append(mask > 0)
        samples = ArraySamples(np.stack(images), np.stack(targets))
        return ImageSplit(samples, tuple(groups), np.stack(regions))

    def kinds_of_patients(self, num_patients: int) -> np.ndarray:
        """(num_patients, num_kinds) bool: the lesion kinds that each patient has."""
        patients = np.arange(num_patients)
        is_rare = patients < max(1, round(_RARE_SHARE * num_patients))
        if self.task == "classification" and self.labels != "multilabel":
            classes = patients % max(self.num_kinds, 2)
            if self.num_kinds > 1:
                classes[is_rare] = self.num_kinds
            return classes[:, None] == np.arange(1, self.num_kinds + 1)
        is_alternating = (patients[:, None] >> np.arange(self.num_kinds)) % 2 == 0
        has_kind = is_alternating | (self.task == "segmentation")
        if self.num_kinds > 1:
            has_kind[:, -1] = is_rare
        return has_kind

    def label(self, kinds: np.ndarray) -> np.ndarray:
        """(K,) float32 for multi-label, otherwise () int64."""
        if self.labels == "multilabel":
            return kinds.astype(np.float32)
        return np.asarray(np.argmax(kinds) + 1 if kinds.any() else 0)

    def draw_mask(self, kinds: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """(H, W[, D]) int64: 0 background, k + 1 where a lesion of kind k lies."""
        sides = np.array(self.image_size)
        pixels = np.moveaxis(np.indices(self.image_size), 0, -1)
        mask = np.zeros(self.image_size, np.int64)
        for kind in np.flatnonzero(kinds):
            centre = random.uniform(0.25, 0.75, len(sides)) * sides
            radii = random.uniform(0.12, 0.22, len(sides)) * sides
            mask[(((pixels - centre) / radii) ** 2).sum(-1) <= 1] = kind + 1
        return mask

    def draw_image(
        self, mask: np.ndarray, patient_random: np.random.Generator, random: np.random.Generator
    ) -> np.ndarray:
        """(C, H, W[, D]) float32: background near 0, lesions between -1 and 1."""
        brightness = np.array([0.0, *map(self.brightness, range(self.num_kinds))])
        slopes = patient_random.uniform(-0.2, 0.2, mask.ndim)
        centred = np.moveaxis(np.indices(mask.shape), 0, -1) / np.array(mask.shape) - 0.5
        noise = random.normal(0, _NOISE_SD, (self.in_channels, *mask.shape))
        return (brightness[mask] + 2 * centred @ slopes + noise).astype(np.float32)

    def brightness(self, kind: int) -> float:
        """1, -1, then fainter pairs: kinds stay apart however many there are."""
        num_pairs = -(-self.num_kinds // 2)
        return (1 - (kind // 2) / num_pairs) * (-1) ** kind


def _spec(cohort: _Cohort, num_classes: int, splits: dict[str, ImageSplit]) -> DataSpec:
    samples = splits["train"].samples
    assert isinstance(samples, ArraySamples)
    if cohort.labels == "multilabel":
        class_names = tuple(f"lesion_{k + 1}" for k in range(num_classes))
        class_counts = samples.targets.sum(0)
    else:
        num_names = max(num_classes, 2)
        first = "background" if cohort.task == "segmentation" else "normal"
        class_names = (first, *(f"lesion_{k}" for k in range(1, num_names)))
        class_counts = np.bincount(samples.targets.ravel(), minlength=num_names)
    return DataSpec(
        name="phantom",
        task=cohort.task,
        labels=cohort.labels,
        in_channels=cohort.in_channels,
        num_classes=num_classes,
        image_size=cohort.image_size,
        class_names=class_names,
        class_counts=tuple(int(count) for count in class_counts),
        num_samples={name: len(split.groups) for name, split in splits.items()},
        num_groups={name: len(set(split.groups)) for name, split in splits.items()},
        group_kind="patient",
        modality="phantom",
        provenance="simulated: ellipsoids on noise",
        origin="made by medlite (Apache-2.0)",
        preprocessing="none: the images are made as tensors",
        spacing_mm=(1.0,) * len(cohort.image_size),
    )
