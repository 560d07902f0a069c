"""Which epoch's weights a fit ends with, where that is not plain."""

import logging

import pytest
import torch
from torch import nn

from medlite.data.module import ImageDataModule
from medlite.data.phantom import phantom
from medlite.tasks.checkpoints import load_tensors
from medlite.tasks.fit import fit
from medlite.types import FitHooks, TrainSettings


def build_data(*, val_classes):
    images = phantom(
        task="classification", labels="multiclass", num_classes=2, image_size=(16, 16),
        num_train=24, num_val=8, num_test=8,
    )  # fmt: skip
    targets = images.val.samples.targets
    targets[:] = torch.arange(len(targets)).numpy() % val_classes
    return ImageDataModule(images, batch_size=8)


def run_fit(directory, data, *, hooks=None, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(data.spec.in_channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip
    return fit(
        net, spec=data.spec, data=data, directory=directory, seed=3, hooks=hooks,
        settings=TrainSettings(**{"epochs": 4, "learning_rate": 1e-2, **settings}),
    )  # fmt: skip


def is_of(result, file):
    state = load_tensors(file)["state_dict"]
    own = result.net.state_dict()
    return all(torch.equal(own[name], state[f"net.{name}"]) for name in own)


def test_an_undefined_metric_leaves_the_last_epoch_and_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = run_fit(tmp_path, build_data(val_classes=1))
    assert is_of(result, tmp_path / "last.ckpt")
    assert load_tensors(tmp_path / "last.ckpt")["epoch"] == 3
    assert "val/auc is undefined in every epoch" in caplog.text


def test_a_defined_metric_is_not_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = run_fit(tmp_path, build_data(val_classes=2))
    assert is_of(result, tmp_path / "best.ckpt")
    assert "undefined" not in caplog.text


@pytest.mark.parametrize("patience", [1, 2])
def test_an_undefined_metric_does_not_stop_the_fit_early(tmp_path, patience):
    data = build_data(val_classes=1)
    assert len(run_fit(tmp_path, data, early_stopping_patience=patience).history) == 4


class KilledError(Exception):
    """Stands for a kill in mid-training."""


def kill_after(num_epochs):
    """Stop a fit of 6 epochs in which the first 2 are the best: from then on it unlearns."""
    epoch = [0]

    def on_epoch_start(net, share):
        epoch[0] = round(6 * share)
        if epoch[0] == num_epochs:
            raise KilledError

    def loss(logits, batch, task_loss):
        return task_loss(logits) * (1 if epoch[0] < 2 else -1)

    return FitHooks(loss=loss, on_epoch_start=on_epoch_start)


def run_unlearning(directory, *, kill=None):
    data = build_data(val_classes=2)
    return run_fit(directory, data, hooks=kill_after(kill), epochs=6, learning_rate=3e-2)


@pytest.fixture
def killed(tmp_path):
    """The folder of a fit that stopped after its best epoch."""
    with pytest.raises(KilledError):
        run_unlearning(tmp_path / "before", kill=4)
    return tmp_path / "before"


def test_the_best_epoch_is_remembered_where_the_folder_was_moved(tmp_path, killed):
    whole = run_unlearning(tmp_path / "whole")
    best = load_tensors(tmp_path / "whole" / "best.ckpt")["epoch"]
    assert best < 4
    moved = killed.rename(tmp_path / "after")
    result = run_unlearning(moved)
    assert load_tensors(moved / "best.ckpt")["epoch"] == best
    assert all(
        torch.equal(value, result.net.state_dict()[name])
        for name, value in whole.net.state_dict().items()
    )


def test_lost_best_weights_are_sought_anew(killed, caplog):
    (killed / "best.ckpt").unlink()
    with caplog.at_level(logging.WARNING):
        result = run_unlearning(killed)
    assert load_tensors(killed / "best.ckpt")["epoch"] >= 4
    assert is_of(result, killed / "best.ckpt")
    assert "the best epoch is sought anew" in caplog.text


def test_best_weights_that_are_lost_after_the_fit_leave_the_last(tmp_path, caplog):
    run_unlearning(tmp_path)
    (tmp_path / "best.ckpt").unlink()
    with caplog.at_level(logging.WARNING):
        result = run_unlearning(tmp_path)
    assert is_of(result, tmp_path / "last.ckpt")
    assert "best.ckpt is gone: the weights of the last epoch are taken" in caplog.text
