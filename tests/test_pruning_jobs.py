"""Pruning in turns and to a latency, as whole jobs on procedural images."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_pipeline import SMALL_GROUPS, run_words

from medlite.pipeline import training
from medlite.pipeline.step_latency import StepLatency
from medlite.safety_settings import SafetyMargins
from medlite.tasks.fit import fit

TURNS = (
    "compression=prune", "compression.prune.iterations=2", "compression.prune.epochs=2",
    "compression.prune.scope=global", *SMALL_GROUPS, "stages=[train,compress]", "control=false",
    "train.budget_minutes=4",
)  # fmt: skip


def weights_of(outputs):
    (path,) = outputs.glob("store/phantom-unet+prune-*/weights.pt")
    return torch.load(path, weights_only=True)["weights"]


def spied_fit(net, *, seen, fails_at="", **options):
    """The real fit, which says what it was asked for and may be stopped before a turn."""
    name = options["directory"].name
    if name == fails_at:
        raise KeyboardInterrupt
    seen[name] = options["settings"]
    return fit(net, **options)


def curves(*dice):
    return [{"epoch": epoch, "val/dice": each} for epoch, each in enumerate(dice)]


@pytest.mark.parametrize(
    ("dice", "told"),
    [((0.1, 0.85), "0.850"), ((0.87, 0.89), ""), ((0.95,), ""), ((float("nan"),) * 2, "nan")],
)
def test_what_training_did_not_win_back_is_told_beyond_the_margin(dice, told):
    job = job_of(budget_minutes=None)
    before = {"baseline": curves(0.7, 0.9), "distill": curves(0.9, 0.8)}
    text = training.unrecovered(job, "prune", before, {**before, "prune": curves(*dice)})
    assert bool(text) is bool(told)
    if told:
        assert text.startswith(f"val/dice was 0.900 before and is {told} after 2 epochs; more of")


def test_all_turns_count_and_a_budget_that_allows_no_more_epochs_is_named():
    before = {"baseline": curves(0.9)}
    turns = {f"prune_{turn}": curves(0.2, 0.3) for turn in (1, 2, 3)}
    text = training.unrecovered(job_of(budget_minutes=4.0), "prune", before, {**before, **turns})
    assert "after 6 epochs; a larger train.budget_minutes (4), or" in text
    enough = training.unrecovered(
        job_of(budget_minutes=60.0, epochs=6), "prune", before, {**before, **turns}
    )
    assert "after 6 epochs; more of them (compression.prune.epochs)" in enough


def job_of(*, budget_minutes, epochs=12):
    return SimpleNamespace(
        spec=SimpleNamespace(task="segmentation"),
        config=SimpleNamespace(
            safety=SafetyMargins(metric_drop=0.02),
            train=SimpleNamespace(budget_minutes=budget_minutes),
            compression={"prune": {"epochs": epochs}},
        ),
    )


def test_a_step_that_trains_nothing_has_nothing_to_win_back():
    history = {"baseline": curves(0.7, 0.9)}
    assert training.unrecovered(None, "ptq", history, history) == ""


@pytest.mark.slow
def test_a_job_that_is_stopped_between_two_turns_ends_in_the_same_weights_within_its_budget(
    tmp_path, monkeypatch
):
    seen, first_seen = {}, {}
    monkeypatch.setattr(training, "fit", partial(spied_fit, seen=first_seen, fails_at="prune_2"))
    with pytest.raises(KeyboardInterrupt):
        run_words(tmp_path / "stopped", *TURNS)
    assert "prune_1" in first_seen
    monkeypatch.setattr(training, "fit", partial(spied_fit, seen=seen))
    run_words(tmp_path / "stopped", *TURNS)
    run_words(tmp_path / "whole", *TURNS)
    first, second = weights_of(tmp_path / "stopped"), weights_of(tmp_path / "whole")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    turns = [seen[f"prune_{turn}"] for turn in (1, 2)]
    assert [(turn.epochs, turn.budget_minutes) for turn in turns] == [(1, 2.0), (1, 2.0)]


@pytest.mark.slow
def test_a_net_pruned_to_a_latency_is_kept_for_the_runtime_that_it_was_timed_on(
    tmp_path, monkeypatch
):
    def count(self, net):
        return float(sum(parameter.numel() for parameter in net.parameters()))

    monkeypatch.setattr(StepLatency, "__call__", count)
    words = (
        "compression=prune", "compression.prune.target=latency", "compression.prune.epochs=1",
        *SMALL_GROUPS, "stages=[train,compress]", "control=false",
    )  # fmt: skip
    for runtime in ("onnxruntime", "openvino", "onnxruntime"):
        run_words(tmp_path, *words, f"runtime={runtime}", name=runtime)
    records = [
        json.loads(path.read_text())
        for path in tmp_path.glob("store/phantom-unet+prune-*/entry.json")
    ]
    texts = sorted(dict(record["notes"])["target of prune"] for record in records)
    assert len(texts) == 2
    assert "on onnxruntime (host)" in texts[0]
    assert "on openvino (host)" in texts[1]
