import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from medlite.data.module import ImageDataModule
from medlite.data.phantom import phantom


def data_module(**options):
    data = phantom(num_train=options.pop("num_train", 13), num_val=4, num_test=6)
    return ImageDataModule(data, **({"batch_size": 4, "seed": 7} | options))


def epoch_of(module, epoch):
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


class Recorder(lightning.LightningModule):
    """Keeps what it is fed; one weight, so that there is something to save."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_index):
        self.seen.append((self.current_epoch, batch.position.tolist(), batch.image.sum().item()))
        return self.weight * batch.image.mean()

    def validation_step(self, batch, batch_index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, epochs, folder, resume=None, **options):
    recorder = Recorder()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(dirpath=folder, filename="last", **options)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, module, ckpt_path=resume, weights_only=True)
    return recorder.seen


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("at_train_end", [True, False])
def test_resumed_run_sees_the_batches_of_an_uninterrupted_one(tmp_path, at_train_end, num_workers):
    options = {"save_on_train_epoch_end": at_train_end}
    checkpoint = tmp_path / "cut" / "last.ckpt"
    module = data_module(num_workers=num_workers)
    whole = fit(module, 4, tmp_path / "whole", **options)
    start = fit(data_module(num_workers=num_workers), 2, tmp_path / "cut", **options)
    module = data_module(num_workers=num_workers)
    rest = fit(module, 4, tmp_path / "cut", resume=checkpoint, **options)
    assert start + rest == whole
    assert len({tuple(positions) for _, positions, _ in whole}) == len(whole)


def test_epochs_differ_in_order_and_augmentation():
    first, second = (
        {int(p): image for batch in epoch_of(data_module(), epoch)
         for p, image in zip(batch.position, batch.image, strict=True)}
        for epoch in (0, 1)
    )  # fmt: skip
    assert list(first) != list(second)
    assert any(not torch.equal(first[p], second[p]) for p in first.keys() & second.keys())


def test_workers_make_the_same_batches_as_the_main_process():
    alone, helped = (epoch_of(data_module(num_workers=n), 3) for n in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_persistent_workers_learn_of_the_next_epoch():
    loader = data_module(num_workers=1).train_dataloader()
    epochs = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        epochs.append(next(iter(loader)))
    expected = epoch_of(data_module(), 1)[0]
    assert torch.equal(epochs[1].image, expected.image)


@pytest.mark.parametrize(("num_train", "sizes"), [(13, [4, 4, 4]), (14, [4, 4, 4, 2]), (1, [1])])
def test_only_a_last_batch_of_one_is_dropped(num_train, sizes):
    batches = epoch_of(data_module(num_train=num_train), 0)
    assert [len(batch.image) for batch in batches] == sizes


def test_unaugmented_batches_hold_the_images_as_they_are():
    module = data_module(augment=False)
    for batch in epoch_of(module, 0):
        for position, image, target in zip(batch.position, batch.image, batch.target, strict=True):
            expected_image, expected_target = module.data.train.samples[int(position)]
            np.testing.assert_array_equal(image, expected_image)
            np.testing.assert_array_equal(target, expected_target)


def test_validation_and_test_batches_come_in_order_without_augmentation():
    module = data_module()
    for loader, split in ((module.val_dataloader(), "val"), (module.test_dataloader(), "test")):
        batches = list(loader)
        positions = torch.cat([batch.position for batch in batches])
        assert positions.tolist() == list(range(len(module.groups(split))))
        image, _ = module.data.split(split).samples[0]
        np.testing.assert_array_equal(batches[0].image[0], image)


def test_calibration_images_are_spread_over_the_training_split():
    module = data_module(num_train=12)
    images = module.calibration_images(3)
    for image, position in zip(images, (0, 4, 8), strict=True):
        np.testing.assert_array_equal(image, module.data.train.samples[position][0])


def test_calibration_batches_carry_targets_and_stop_at_the_end_of_the_split():
    module = data_module(num_train=10)
    batches = module.calibration_batches(5)
    assert [len(batch.image) for batch in batches] == [4, 4, 2]
    for batch in batches:
        for position, target in zip(batch.position, batch.target, strict=True):
            np.testing.assert_array_equal(target, module.data.train.samples[int(position)][1])


def test_validation_batches_come_from_the_validation_split():
    module = data_module()
    (batch,) = module.validation_batches(1)
    assert len(batch.image) == 4
    for image, position in zip(batch.image, batch.position, strict=True):
        np.testing.assert_array_equal(image, module.data.val.samples[int(position)][0])


def test_test_images_come_from_the_test_split():
    module = data_module()
    assert torch.equal(
        module.test_images(6), torch.cat([b.image for b in module.test_dataloader()])
    )
