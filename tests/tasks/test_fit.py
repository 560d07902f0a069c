import pickle

import pytest
import torch
from torch import nn

from medlite.data.module import ImageDataModule
from medlite.data.phantom import phantom
from medlite.errors import RecordError, TrainingError
from medlite.tasks.checkpoints import load_tensors, save_tensors
from medlite.tasks.fit import fit
from medlite.tasks.plan import FitPlan, plan_fit
from medlite.types import FitHooks, TrainSettings


class KilledError(Exception):
    """Stands for a kill in mid-training."""


def build_data(seed=0, num_workers=0):
    images = phantom(
        task="segmentation", labels="binary", image_size=(16, 16),
        num_train=24, num_val=8, num_test=8,
    )  # fmt: skip
    return ImageDataModule(images, batch_size=8, augment=True, seed=seed, num_workers=num_workers)


def build_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.LazyConv2d(4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3),
        nn.Conv2d(4, 1, 1),
    )  # fmt: skip


def run_fit(directory, *, hooks=None, data=None, **settings):
    data = data or build_data()
    net = build_net()
    net(torch.zeros(1, *data.spec.input_shape))
    with torch.no_grad():
        torch.manual_seed(1)
        net[0].reset_parameters()
    return fit(
        net, spec=data.spec, data=data, directory=directory, seed=3, hooks=hooks,
        settings=TrainSettings(**{"epochs": 3, "learning_rate": 1e-2, **settings}),
    )  # fmt: skip


def weights_of(result):
    return torch.cat([value.flatten().float() for value in result.net.state_dict().values()])


def kill_at(share):
    def on_epoch_start(net, progress):
        if progress >= share:
            raise KilledError

    return FitHooks(on_epoch_start=on_epoch_start)


def test_fit_learns(tmp_path):
    result = run_fit(tmp_path, epochs=12)
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
    assert len(result.history) == 12


def test_the_same_seed_gives_the_same_weights(tmp_path):
    first, second = run_fit(tmp_path / "a"), run_fit(tmp_path / "b")
    assert torch.equal(weights_of(first), weights_of(second))


@pytest.mark.parametrize(("ema_decay", "num_workers"), [(None, 0), (0.9, 0), (None, 1)])
def test_a_resumed_fit_ends_in_the_weights_of_an_uninterrupted_one(
    tmp_path, ema_decay, num_workers
):
    def run(name, hooks=None):
        data = build_data(num_workers=num_workers)
        return run_fit(tmp_path / name, data=data, hooks=hooks, ema_decay=ema_decay)

    whole = run("whole")
    with pytest.raises(KilledError):
        run("killed", hooks=kill_at(0.5))
    resumed = run("killed")
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in resumed.history]


def test_another_seed_gives_other_weights(tmp_path):
    other = run_fit(tmp_path / "b", data=build_data(seed=9))
    assert not torch.equal(weights_of(run_fit(tmp_path / "a")), weights_of(other))


def test_the_best_epoch_is_kept(tmp_path):
    result = run_fit(tmp_path, epochs=6)
    monitored = [row["val/dice"] for row in result.history]
    data = build_data()
    counted = [0, 0]
    for batch in data.val_dataloader():
        with torch.no_grad():
            mask = result.net(batch.image)[:, 0] > 0
        counted[0] += 2 * (mask & (batch.target == 1)).sum().item()
        counted[1] += (mask.sum() + (batch.target == 1).sum()).item()
    assert counted[0] / counted[1] == pytest.approx(max(monitored), abs=1e-6)


def test_early_stopping_stops(tmp_path):
    result = run_fit(tmp_path, epochs=50, learning_rate=0.0, early_stopping_patience=2)
    assert len(result.history) == 3


def test_a_nan_names_the_batch_and_its_samples(tmp_path):
    data = build_data()
    data.data.train.samples.images[5] = float("nan")
    with pytest.raises(TrainingError, match=r"epoch 0, batch \d .*positions \[5\] hold NaN"):
        run_fit(tmp_path, data=data)


def test_an_overflowing_loss_advises_a_lower_learning_rate(tmp_path):
    hooks = FitHooks(loss=lambda logits, batch, loss: loss(logits) * float("inf"))
    with pytest.raises(TrainingError, match=r"lower train\.learning_rate"):
        run_fit(tmp_path, hooks=hooks)


def test_a_loss_hook_replaces_the_loss(tmp_path):
    hooks = FitHooks(loss=lambda logits, batch, loss: 0.0 * loss(logits) + logits.square().mean())
    result = run_fit(tmp_path, hooks=hooks, epochs=8)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.history[0]["loss"] != run_fit(tmp_path / "plain").history[0]["loss"]


def test_auxiliary_parameters_are_trained_and_left_out(tmp_path):
    auxiliary = nn.Conv2d(1, 1, 1)
    before = auxiliary.weight.detach().clone()
    hooks = FitHooks(
        auxiliary=auxiliary,
        loss=lambda logits, batch, loss: loss(logits) + auxiliary(logits).square().mean(),
    )
    result = run_fit(tmp_path, hooks=hooks)
    assert not torch.equal(before, auxiliary.weight)
    assert not any("auxiliary" in name for name in result.net.state_dict())


def test_a_mode_hook_is_told_of_training_and_evaluation(tmp_path):
    told = []

    def set_mode(net, is_training):
        told.append(is_training)
        net.train(is_training)

    run_fit(tmp_path, hooks=FitHooks(set_mode=set_mode), epochs=2)
    per_epoch = "".join("TE"[not mode] for mode in told)
    assert "TE" in per_epoch
    assert per_epoch.endswith("E")


def test_timing_leaves_the_net_as_it_was(tmp_path):
    long = run_fit(tmp_path / "a", epochs=1, budget_minutes=60)
    assert torch.equal(weights_of(long), weights_of(run_fit(tmp_path / "b", epochs=1)))


@pytest.mark.parametrize("budget_minutes", [0.05, 1, 10, 100])
def test_a_plan_keeps_its_budget(budget_minutes):
    plan = plan_fit(
        epochs=20, num_batches=58, num_val_batches=9, seconds=(1.5, 0.5),
        budget_minutes=budget_minutes,
    )  # fmt: skip
    least = plan.epochs * (1.5 + 0.5)
    assert plan.estimated_seconds <= max(60 * budget_minutes, least)
    assert plan.batches_per_epoch >= 1


def test_a_plan_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    plan = plan_fit(
        epochs=2, num_batches=5, num_val_batches=2, seconds=(1.0, 0.5), budget_minutes=None
    )
    plan.write(tmp_path / "plan.json")
    assert FitPlan.read(tmp_path / "plan.json") == plan
    (tmp_path / "plan.json").unlink()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        plan.write(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    save_tensors({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RecordError, match="truncated or damaged"):
        load_tensors(path)


class Malicious:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_checkpoint_that_runs_code_is_refused(tmp_path, capsys):
    path = tmp_path / "weights.pt"
    torch.save({"weights": Malicious()}, path)
    with pytest.raises(RecordError, match="could run code"):
        load_tensors(path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(RecordError, match=r"weights\.pt was not loaded"):
        load_tensors(path)
    assert "this ran" not in capsys.readouterr().out


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    save_tensors({"weight": torch.zeros(3)}, path)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"weight": torch.ones(3)}, path)
    assert torch.equal(load_tensors(path)["weight"], torch.zeros(3))
    assert list(tmp_path.iterdir()) == [path]
