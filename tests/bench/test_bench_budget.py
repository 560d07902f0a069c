"""Budgets: what fits, what is missed by how much, what nobody knows."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from medlite.bench.budget import judge_budgets
from medlite.types import Hardware, Measurement

PROFILES = sorted((Path(__file__).parents[2] / "conf" / "hardware").glob("*.yaml"))


def row(name, value, unit):
    return Measurement(name=name, value=value, unit=unit)


MEASURED = [
    row("latency/fake/p90_ms", 12.0, "ms"),
    row("memory/fake/peak_mib", 75.0, "MiB"),
    row("size/fake/disk_kib", 3072.0, "KiB"),
    Measurement.unavailable("energy/fake/net_mj_per_image", "mJ", "no RAPL package"),
]


def judge(**budgets):
    verdicts = judge_budgets(MEASURED, ["fake"], Hardware(**budgets))
    assert len(verdicts) == 1
    return verdicts[0]


def test_within_the_budget_fits_and_says_what_is_left():
    verdict = judge(max_peak_memory_mib=100.0)
    assert (verdict.verdict, verdict.margin) == ("fits", "25 MiB left (25%)")


def test_over_the_budget_is_missed_by_its_excess():
    verdict = judge(max_latency_p90_ms=10.0)
    assert (verdict.verdict, verdict.margin) == ("missed", "2 ms over (20%)")


def test_size_is_judged_in_the_unit_of_its_budget():
    verdict = judge(max_size_mib=4.0)
    assert (verdict.value, verdict.unit, verdict.verdict) == (3.0, "MiB", "fits")


def test_exactly_the_budget_fits():
    assert judge(max_latency_p90_ms=12.0).verdict == "fits"


def test_what_was_not_measured_is_unknown_with_its_reason():
    verdict = judge(max_energy_mj=5.0)
    assert (verdict.verdict, verdict.value, verdict.margin) == ("unknown", None, "no RAPL package")


def test_runtime_without_measurements_is_unknown():
    verdict = judge_budgets([], ["absent"], Hardware(max_size_mib=1.0))[0]
    assert (verdict.verdict, verdict.margin) == ("unknown", "size/absent/disk_kib was not measured")


def test_profile_without_budgets_judges_nothing():
    assert judge_budgets(MEASURED, ["fake"], Hardware()) == []


def test_verdict_for_another_machine_is_labelled():
    verdict = judge(max_latency_p90_ms=20.0, is_this_machine=False)
    assert verdict.margin.endswith("(measured on this host, not on the target)")


def test_every_runtime_meets_every_budget():
    hardware = Hardware(max_size_mib=1.0, max_latency_p90_ms=1.0)
    verdicts = judge_budgets(MEASURED, ["fake", "other"], hardware)
    assert len({(verdict.name, verdict.runtime) for verdict in verdicts}) == 4


def test_the_profiles_are_found():
    assert {"host", "cpu_1_thread", "laptop_8gb", "cuda"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profile_is_a_hardware_of_its_own_name(path):
    hardware = Hardware(**OmegaConf.to_container(OmegaConf.load(path)))
    assert hardware.name == path.stem
    assert hardware.device in {"cpu", "cuda"}
    assert hardware.description
