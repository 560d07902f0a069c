"""The audit: what a claim's digits mean, what is counted, and where a metric comes from."""

import csv
import json

import pytest
import wandb
import yaml
from torch import nn

from medlite.audit.audit import Audit
from medlite.audit.claims import Claim, read_claims
from medlite.audit.command import log_table, main
from medlite.audit.runs import Evidence
from medlite.command_line import conf_directory, find_options
from medlite.errors import ConfigError, MedliteError
from medlite.report.result import RunResult, write_result
from medlite.types import Measurement

TINY_PARAMETERS = (3 * 9 + 1) * 4
TINY_MACS = 3 * 9 * 4 * 64


class Tiny(nn.Module):
    """One convolution; three of them before merging."""

    def __init__(self, *, in_channels, num_classes, branches=3):
        super().__init__()
        convs = (nn.Conv2d(in_channels, num_classes, 3, padding=1) for _ in range(branches))
        self.branches = nn.ModuleList(convs)

    def forward(self, images):
        return sum(branch(images) for branch in self.branches)

    def deploy(self):
        return Tiny(in_channels=3, num_classes=4, branches=1).eval()


def claim(**changes):
    values = {
        "model": "tiny", "quantity": "params", "claimed": "110", "source": "a paper",
        "input": (3, 8, 8), "num_classes": 4,
    }  # fmt: skip
    return Claim(**values | changes)


@pytest.fixture
def conf(tmp_path):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "tiny.yaml").write_text(f"_target_: {__name__}.Tiny\n")
    return tmp_path / "conf"


def write_registry(path, **claims):
    path.write_text(yaml.safe_dump(claims))
    return path


@pytest.mark.parametrize(
    ("claimed", "half_unit"), [("2.1e6", 5e4), ("49457", 0.5), ("0.060e9", 5e5), ("6e6", 5e5)]
)
def test_digits_say_how_precise_a_claim_is(claimed, half_unit):
    assert claim(claimed=claimed).half_unit == half_unit


@pytest.mark.parametrize(
    ("claimed", "verdict"),
    [("112", "as claimed"), ("1.1e2", "as claimed"), ("111", "as claimed"), ("110", "differs")],
)
def test_a_claim_holds_to_the_digits_that_it_has_or_to_one_percent(conf, claimed, verdict):
    row = Audit([conf]).check(claim(claimed=claimed, reason="because"))
    assert (row.measured, row.verdict, row.reason) == (TINY_PARAMETERS, verdict, "because")
    assert row.input == "3x8x8, 4 classes"


def test_networks_are_counted_as_they_are_deployed_unless_the_claim_says_otherwise(conf):
    audit = Audit([conf])
    assert audit.check(claim(form="training")).measured == 3 * TINY_PARAMETERS
    assert audit.check(claim(quantity="macs")).measured == TINY_MACS
    assert audit.check(claim(quantity="macs", form="training")).measured == 3 * TINY_MACS


def test_an_override_builds_another_network(conf):
    row = Audit([conf]).check(claim(form="training", overrides={"branches": 2}))
    assert row.measured == 2 * TINY_PARAMETERS
    assert row.input == "3x8x8, 4 classes, branches 2, before merging"


def test_what_cannot_be_checked_says_so(conf):
    row = Audit([conf]).check(claim(quantity="latency", unit="ms", unavailable="needs a phone"))
    assert (row.measured, row.verdict, row.reason) == (None, "not checked", "needs a phone")


def finished_run(directory, *, seed, auc, compression="none", epochs=100, created="2026-01-01"):
    prefix = "test" if compression == "none" else "baseline/test"
    result = RunResult(
        name=f"run-{seed}",
        created_at=created,
        choices={"model": "tiny", "compression": compression},
        primary_metric="auc",
        dataset={"name": "medmnist/retinamnist"},
        config={"seed": seed, "train": {"epochs": epochs}},
        environment={},
        measurements=[Measurement(name=f"{prefix}/auc", value=auc, unit="")],
        stages=[],
        verdict={},
        artifacts=[],
    )
    path = directory / f"{seed}-{compression}-{epochs}-{created}"
    path.mkdir()
    write_result(result, path)


def metric_claim(**changes):
    values = {
        "quantity": "metric", "metric": "auc", "dataset": "medmnist/retinamnist",
        "claimed": "0.717", "where": {"train.epochs": 100}, "reason": "experiment=x",
    }  # fmt: skip
    return claim(**values | changes)


def test_a_metric_inside_the_interval_of_three_seeds_is_reproduced(tmp_path):
    for seed, auc in enumerate((0.71, 0.72, 0.73)):
        finished_run(tmp_path, seed=seed, auc=auc)
    row = Audit([], [tmp_path]).check(metric_claim())
    assert row.measured == pytest.approx(0.72)
    assert row.verdict == "as claimed"
    assert row.reason == "mean of 3 seeds, 95 % +- 0.025"  # 4.303 * 0.01 / sqrt(3)
    assert Audit([], [tmp_path]).check(metric_claim(claimed="0.75")).verdict == "differs"


def test_one_seed_is_not_enough_to_call_a_metric_reproduced(tmp_path):
    finished_run(tmp_path, seed=0, auc=0.717)
    row = Audit([], [tmp_path]).check(metric_claim())
    assert (row.measured, row.verdict) == (0.717, "not checked")
    assert row.reason == "1 seed: 3 are needed to call it reproduced"


def test_runs_of_other_settings_and_older_runs_of_a_seed_do_not_count(tmp_path):
    finished_run(tmp_path, seed=0, auc=0.1, epochs=1)
    finished_run(tmp_path, seed=0, auc=0.2, created="2025-01-01")
    finished_run(tmp_path, seed=0, auc=0.7, compression="qat")
    row = Audit([], [tmp_path]).check(metric_claim())
    assert row.measured == 0.7
    assert (
        Audit([], [tmp_path]).check(metric_claim(model="other")).reason
        == "needs a run: experiment=x"
    )


def test_interval_of_one_value_is_unbounded():
    assert Evidence(values=(0.5,)).holds(0.5) is None
    assert Evidence(values=(0.5, 0.5, 0.5)).holds(0.5)


def test_all_mistakes_of_a_registry_are_told_at_once(tmp_path):
    wrong = {
        "input": [3, 8, 8],
        "num_classes": 4,
        "claims": [
            {"quantity": "parms", "claimed": "1e6", "source": "x"},
            {"quantity": "params", "claimed": 1e6, "source": "x"},
            {"quantity": "latency", "claimed": "1", "sorce": "x"},
            {"quantity": "metric", "claimed": "many", "source": "x"},
        ],
    }
    with pytest.raises(ConfigError) as raised:
        read_claims(write_registry(tmp_path / "claims.yaml", tiny=wrong))
    text = str(raised.value)
    for part in (
        "tiny.claims.0: quantity 'parms', did you mean 'params'?",
        "tiny.claims.1: claimed 1000000.0 must stand in quotes",
        "tiny.claims.2: no such key 'sorce', did you mean 'source'?",
        "tiny.claims.2: 'source' is missing",
        "tiny.claims.2: a latency needs 'unavailable'",
        "tiny.claims.3: claimed 'many' is not a number",
        "tiny.claims.3: a metric needs 'metric' and 'dataset'",
    ):
        assert part in text


def test_every_claim_of_the_registry_is_of_a_model_that_exists():
    claims = read_claims()
    assert len(claims) >= 90
    assert {each.model for each in claims} <= set(find_options([conf_directory()])["model"])


def test_command_prints_and_writes_every_form(tmp_path, conf, capsys):
    entry = {"quantity": "params", "claimed": "110", "source": "a paper", "reason": "why [not]"}
    node = {"input": [3, 8, 8], "num_classes": 4, "claims": [entry]}
    registry = write_registry(tmp_path / "claims.yaml", tiny=node)
    names = {kind: tmp_path / f"audit.{kind}" for kind in ("json", "csv", "html")}
    words = [f"--{kind}={path}" for kind, path in names.items()]
    assert main(["model=tiny", f"--claims={registry}", f"--config-dir={conf}", *words]) == 0
    shown = capsys.readouterr().out
    assert "1 claims: 0 as claimed, 1 differs, 0 not checked" in shown
    assert "why [not]" in shown
    (row,) = json.loads(names["json"].read_text())["rows"]
    assert row | {"verdict": ""} == {
        "model": "tiny", "quantity": "params", "claimed": 110.0, "measured": TINY_PARAMETERS,
        "unit": "parameters", "input": "3x8x8, 4 classes", "source": "a paper",
        "reason": "why [not]", "verdict": "",
    }  # fmt: skip
    (csv_row,) = csv.DictReader(names["csv"].open())
    assert csv_row["measured"] == str(TINY_PARAMETERS)
    assert "why [not]" in names["html"].read_text()


def test_table_goes_to_wandb_as_a_run_of_its_own(tmp_path, conf, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logged = []
    init = wandb.init

    def spying_init(**options):
        run = init(**options)
        monkeypatch.setattr(run, "log", logged.append)
        return run

    monkeypatch.setattr(wandb, "init", spying_init)
    log_table([Audit([conf]).check(claim())], "offline")
    table = logged[0]["audit"]
    assert table.columns[:4] == ["model", "quantity", "claimed", "measured"]
    assert table.data[0][:4] == ["tiny", "params", 110.0, TINY_PARAMETERS]
    assert wandb.run is None


def test_wrong_directories_registries_and_overrides_are_told(tmp_path, conf):
    with pytest.raises(MedliteError, match="nowhere: no such directory"):
        main(["--runs", str(tmp_path / "nowhere")])
    path = tmp_path / "list.yaml"
    path.write_text("- tiny")
    with pytest.raises(ConfigError, match=r"list\.yaml: expected a mapping of models"):
        read_claims(path)
    with pytest.raises(ConfigError, match=r"tiny\.branhces: Tiny takes no 'branhces'"):
        Audit([conf]).check(claim(overrides={"branhces": 2}))


def test_a_network_without_claims_is_answered_with_the_closest():
    with pytest.raises(MedliteError, match="nothing is claimed of it, did you mean 'resnet18'"):
        main(["model=resnet81"])
    with pytest.raises(MedliteError, match="resnet18: expected model=NAME"):
        main(["resnet18"])


@pytest.mark.slow
def test_every_claim_that_differs_says_why():
    audit = Audit([conf_directory()])
    rows = [audit.check(each) for each in read_claims()]
    assert [row for row in rows if row.verdict != "as claimed" and not row.reason] == []
