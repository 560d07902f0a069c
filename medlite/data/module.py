"""The one LightningDataModule: any `ImageData` as batches, the same ones after a kill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from medlite.data.augmentation import Augmentation
from medlite.data.image_data import ImageData, ImageSplit, Samples
from medlite.types import Batch, DataSpec, Split


class ImageDataModule(lightning.LightningDataModule):
    """Batches of an `ImageData`; training batches are functions of (seed, epoch, position).

    Order and augmentation never depend on the state of a random generator or on the number of
    workers, so a run that is killed and resumed at an epoch's boundary sees the batches that an
    uninterrupted one sees. Lightning tells the sampler the epoch through `set_epoch`.

    Args:
        data: the images and their splits.
        batch_size: samples in a batch. A last training batch of one sample is dropped, because
            batch normalisation cannot train on it.
        num_workers: loading processes; 0 loads in this one.
        augment: change training images at random, see `Augmentation`.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        batch_size: int,
        num_workers: int = 0,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data = data
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.seed = seed

    @property
    def spec(self) -> DataSpec:
        """The description of the dataset."""
        return self.data.spec

    def groups(self, split: Split) -> tuple[str, ...]:
        """The patient (lesion, image) of each sample of `split`, by `Batch.position`."""
        return self.data.split(split).groups

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented batches."""
        samples = self.data.train.samples
        augmentation = None
        if self.augment:
            augmentation = Augmentation(self.spec.modality, self.spec.image_size)
        return self._loader(
            TrainingDataset(samples, augmentation, self.seed),
            sampler=EpochSampler(len(samples), self.seed, epoch=self._current_epoch()),
            drop_last=len(samples) > self.batch_size > 1 == len(samples) % self.batch_size,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation split, in order."""
        return self._loader(PlainDataset(self.data.val.samples))

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, in order."""
        return self._loader(PlainDataset(self.data.test.samples))

    def calibration_images(self, n: int) -> Tensor:
        """`n` training images without augmentation, (n, C, H, W[, D]) float32.

        They are spread evenly over the split; all of them where it has fewer than `n`.
        """
        return _batch(self.data.train, n).image

    def calibration_batches(self, n: int) -> list[Batch]:
        """`n` batches of training samples without augmentation, with targets.

        Fewer where the split has fewer than `n` batches.
        """
        return self._batches(self.data.train, n)

    def validation_batches(self, n: int) -> list[Batch]:
        """`n` batches of validation samples, with targets, spread evenly over the split.

        Fewer where the split has fewer than `n` batches.
        """
        return self._batches(self.data.val, n)

    def test_images(self, n: int) -> Tensor:
        """`n` test images, (n, C, H, W[, D]) float32, spread evenly over the split."""
        return _batch(self.data.test, n).image

    def _batches(self, split: ImageSplit, n: int) -> list[Batch]:
        batch = _batch(split, n * self.batch_size)
        parts = (part.split(self.batch_size) for part in batch)
        return [Batch(*part) for part in zip(*parts, strict=True)]

    def _current_epoch(self) -> int:
        """The epoch that the trainer is about to run.

        Lightning 2.6 starts the first iterator, and with it the workers, before it calls
        `set_epoch`, so after a resume the sampler has to know from the beginning.
        """
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_progress
        return progress.current.processed

    def _loader(
        self,
        dataset: Dataset[Any],
        *,
        sampler: Sampler[Any] | None = None,
        drop_last: bool = False,
    ) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class EpochSampler(Sampler[tuple[int, int]]):
    """Every (epoch, position) of an epoch once, in an order made from (seed, epoch) alone.

    The epoch travels with the position, so that workers that outlive an epoch learn of it.
    """

    def __init__(self, num_samples: int, seed: int, *, epoch: int = 0) -> None:
        self._num_samples = num_samples
        self._seed = seed
        self._epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch, and after a resume."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self._seed, self._epoch)).permutation(self._num_samples)
        return ((self._epoch, int(position)) for position in order)


class TrainingDataset(Dataset[Batch]):
    """Samples by (epoch, position), augmented where an augmentation is given."""

    def __init__(self, samples: Samples, augmentation: Augmentation | None, seed: int) -> None:
        self._samples = samples
        self._augmentation = augmentation
        self._seed = seed

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, position = key
        image, target, index = _sample(self._samples, position)
        if self._augmentation is None:
            return Batch(image, target, index)
        has_mask = target.ndim == image.ndim - 1
        seed = (self._seed, epoch, position)
        image, mask = self._augmentation(image, target if has_mask else None, seed)
        return Batch(image, target if mask is None else mask, index)


class PlainDataset(Dataset[Batch]):
    """Samples by position, as they are."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, position: int) -> Batch:
        return _sample(self._samples, position)


def _sample(samples: Samples, position: int) -> Batch:
    """One sample: image (C, H, W[, D]), target without batch axis, position ()."""
    image, target = samples[position]
    return Batch(_tensor(image), _tensor(target), torch.tensor(position))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def _batch(split: ImageSplit, n: int) -> Batch:
    """`n` samples of `split`, spread evenly over it; all where it has fewer."""
    num_samples = len(split.samples)
    positions = np.linspace(0, num_samples, min(n, num_samples), endpoint=False).astype(int)
    return default_collate([_sample(split.samples, int(position)) for position in positions])
