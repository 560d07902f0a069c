"""Which epoch's weights a fit ends with, where that is not plain."""

import logging

import pytest
import torch
from torch import nn

from medlite.data.module import ImageDataModule
from medlite.data.phantom import phantom
from medlite.tasks.checkpoints import load_tensors
from medlite.tasks.fit import fit
from medlite.types import TrainSettings


def build_data(*, val_classes):
    images = phantom(
        task="classification", labels="multiclass", num_classes=2, image_size=(16, 16),
        num_train=24, num_val=8, num_test=8,
    )  # fmt: skip
    targets = images.val.samples.targets
    targets[:] = torch.arange(len(targets)).numpy() % val_classes
    return ImageDataModule(images, batch_size=8)


def run_fit(directory, data, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(data.spec.in_channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip
    return fit(
        net, spec=data.spec, data=data, directory=directory, seed=3,
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
