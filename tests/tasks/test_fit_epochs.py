"""Which epoch's weights a fit ends with, where that is not plain."""

import csv
import logging

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
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


def run_fit(directory, data, *, hooks=None, loggers=(), **settings):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(data.spec.in_channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip
    return fit(
        net, spec=data.spec, data=data, directory=directory, seed=3, hooks=hooks, loggers=loggers,
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


def run_unlearning(directory, *, kill=None, **arguments):
    data, hooks = build_data(val_classes=2), kill_after(kill)
    return run_fit(directory, data, hooks=hooks, epochs=6, learning_rate=3e-2, **arguments)


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


def test_a_fit_that_stopped_early_trains_nothing_more(tmp_path):
    first = run_unlearning(tmp_path, early_stopping_patience=1)
    assert len(first.history) < 6
    for _ in range(2):
        again = run_unlearning(tmp_path, early_stopping_patience=1)
        assert again.history == first.history
        assert again.seconds == first.seconds
        assert is_of(first, tmp_path / "best.ckpt")
        assert is_of(again, tmp_path / "best.ckpt")


def test_csv_curves_of_a_resumed_fit_are_whole(tmp_path):
    def logger():
        return CSVLogger(tmp_path, name="curves", version="baseline")

    with pytest.raises(KilledError):
        run_unlearning(tmp_path / "fit", kill=4, loggers=[logger()])
    result = run_unlearning(tmp_path / "fit", loggers=[logger()])
    with (tmp_path / "curves" / "baseline" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert [int(row["epoch"]) for row in rows] == list(range(6))
    logged = [float(row["val/loss"]) for row in rows]
    assert logged == pytest.approx([row["val/loss"] for row in result.history])
    assert [int(row["step"]) for row in rows] == [2, 5, 8, 11, 14, 17]
