"""Candidates side by side: names, order, isolation and what failure leaves behind."""

import os
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from fake_runtime import FakeRuntime

from medlite.bench import worker
from medlite.errors import BenchmarkError, ConfigError
from medlite.types import Hardware

FAKE = FakeRuntime()
NAMES = {
    "latency/fake/p50_ms",
    "latency/fake/p90_ms",
    "latency/fake/mean_ms",
    "throughput/fake/images_per_s",
    "memory/fake/peak_mib",
    "memory/fake/runtime_only_mib",
    "memory/fake/model_mib",
    "size/fake/disk_kib",
    "energy/fake/net_mj_per_image",
    "operators/fake/int8_count",
}


def by_name(result):
    return {measurement.name: measurement for measurement in result.measurements}


def test_every_number_of_both_candidates_is_there_under_its_stable_name(run):
    result = run([("", FAKE), ("baseline", FAKE)])
    names = by_name(result)
    assert len(names) == len(result.measurements)
    assert names.keys() >= NAMES | {f"baseline/{name}" for name in NAMES}
    assert names["speedup/fake/ratio"].n == 4
    assert names["size/fake/disk_kib"].value == 2.0
    assert names["operators/fake/int8_count"].value == 2
    assert set(result.samples_ms) == set(result.stability) == {"fake", "baseline/fake"}
    assert len(result.samples_ms["fake"]) == 8
    assert result.engines["fake"] == {"engine": "fake"}


def test_predictions_are_those_of_every_image_in_order(run, images):
    result = run([("", FAKE)])
    np.testing.assert_allclose(
        result.predictions["fake"][:, 0], images.mean(axis=(1, 2, 3)), rtol=1e-5
    )


def test_more_images_than_one_answer_holds_are_all_predicted(run, monkeypatch):
    monkeypatch.setattr("medlite.bench.lane.PREDICTED_AT_ONCE", 3)
    predicted = run([("", FAKE)]).predictions["fake"]
    assert len(predicted) == len(set(predicted[:, 0])) == 7


def test_candidates_take_turns_round_by_round(run, tmp_path):
    log = tmp_path / "queries.txt"
    runtimes = [("", FakeRuntime(name=name, log=str(log))) for name in "ab"]
    run(runtimes, num_queries=28)
    blocks = [(name, len(list(queries))) for name, queries in groupby(log.read_text().split())]
    rounds = [name for name, count in blocks if count == 9]  # 7 timed, 2 to warm up again
    assert rounds[:8] == ["a", "b"] * 4


def test_images_and_predictions_do_not_stay_on_disk(run, tmp_path):
    run([("", FAKE)])
    assert {path.suffix for path in (tmp_path / "bench").iterdir()} == {".json", ".txt"}


def test_slower_baseline_shows_as_speedup(run):
    slow, quick = FakeRuntime(delay_ms=20), FakeRuntime(delay_ms=2)
    speedup = by_name(run([("", quick), ("baseline", slow)]))["speedup/fake/ratio"]
    assert speedup.value > 1.5
    assert speedup.spread[0] <= speedup.value <= speedup.spread[1]


def test_throughput_is_measured_in_batches_and_not_from_latency(run):
    names = by_name(run([("", FakeRuntime(delay_ms=5))]))
    throughput = names["throughput/fake/images_per_s"]
    latency_ms = names["latency/fake/p50_ms"].value
    assert throughput.n % 4 == 0
    assert throughput.value > 1.5 * 1000 / latency_ms


def test_memory_of_the_model_is_what_it_adds_to_the_engine(run):
    names = by_name(run([("", FakeRuntime(ballast_mib=64))]))
    peak, empty, model = (
        names[f"memory/fake/{name}_mib"].value for name in ("peak", "runtime_only", "model")
    )
    assert 64 <= model < 80
    assert model == pytest.approx(peak - empty)


def test_images_do_not_count_as_memory_of_the_model(run):
    many = np.zeros((160, 1, 256, 256), np.float32)
    names = by_name(run([("", FAKE)], images=many, num_queries=160))
    assert names["memory/fake/model_mib"].value < many.nbytes / 2**20 / 2


def test_threads_are_set_before_the_engine_is_imported(run):
    result = run([("", FakeRuntime(answer="threads"))], hardware=Hardware(num_threads=3))
    assert (result.predictions["fake"] == 3).all()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_process_is_pinned_to_the_cores_of_the_profile(run):
    core = min(os.sched_getaffinity(0))
    hardware = Hardware(cpu_affinity=[core])
    assert (
        run([("", FakeRuntime(answer="cores"))], hardware=hardware).predictions["fake"] == 1
    ).all()


def test_measuring_process_imports_no_torch_of_its_own(run):
    assert not run([("", FakeRuntime(answer="has torch"))]).predictions["fake"].any()


def test_candidate_that_cannot_run_is_recorded_and_the_others_go_on(run):
    refusing = FakeRuntime(name="absent", misbehaviour="refuses")
    result = run([("", FAKE), ("", refusing)])
    names = by_name(result)
    assert result.failures == {"absent": "this engine is not installed here"}
    assert names["latency/fake/p50_ms"].value > 0
    for name in NAMES - {"size/fake/disk_kib"}:
        lost = names[name.replace("fake", "absent")]
        assert (lost.source, lost.note) == ("unavailable", "this engine is not installed here")
    assert "absent" not in result.predictions


def test_crash_in_the_middle_keeps_the_last_words_of_the_engine(run):
    late = FakeRuntime(name="late", misbehaviour="crashes late")
    result = run([("", FAKE), ("", late)])
    assert "ZeroDivisionError: engine trouble" in result.failures["late"]
    assert set(result.predictions) == {"fake"}


def test_what_was_whole_before_a_failure_is_kept(run):
    poor = FakeRuntime(name="poor", misbehaviour="crashes on batches")
    result = run([("", FAKE), ("", poor), ("baseline", poor)])
    names = by_name(result)
    assert "ZeroDivisionError" in result.failures["poor"]
    assert len(result.predictions["poor"]) == 7
    assert len(result.samples_ms["poor"]) == 8
    assert "poor" in result.stability
    assert "poor" not in result.operators
    assert names["throughput/poor/images_per_s"].source == "unavailable"
    assert names["speedup/poor/ratio"].value > 0


def test_lost_baseline_leaves_the_speedup_open(run):
    result = run([("", FAKE), ("baseline", FakeRuntime(misbehaviour="refuses"))])
    assert by_name(result)["speedup/fake/ratio"].source == "unavailable"


def test_process_that_gives_no_answer_is_ended(run):
    hanging = FakeRuntime(name="hanging", misbehaviour="hangs")
    result = run([("", FAKE), ("", hanging)], timeout_seconds=3)
    assert "gave no answer in 3 s" in result.failures["hanging"]


def test_memory_limit_of_the_profile_is_enforced(run):
    greedy = FakeRuntime(name="greedy", ballast_mib=2000)
    hardware = Hardware(num_threads=1, memory_limit_mib=1000)
    result = run([("", FAKE), ("", greedy)], hardware=hardware)
    assert "under its memory limit of 1000 MiB" in result.failures["greedy"]
    assert "fake" in result.predictions


def test_nothing_left_to_measure_is_an_error_with_all_reasons(run):
    with pytest.raises(BenchmarkError, match=r"none of the candidates.*\n  fake: this engine"):
        run([("", FakeRuntime(misbehaviour="refuses"))])


def test_affinity_to_cores_that_are_not_there_is_refused(run):
    with pytest.raises(BenchmarkError, match=r"hardware\.cpu_affinity=\[4096\]"):
        run([("", FAKE)], hardware=Hardware(cpu_affinity=[4096]))


def test_figures_for_another_machine_are_labelled(run):
    result = run([("", FAKE)], hardware=Hardware(num_threads=1, is_this_machine=False))
    measured = [each for each in result.measurements if each.source == "measured"]
    assert all("measured on this host, not on the target" in each.note for each in measured)


def test_energy_that_is_switched_off_is_absent_with_its_reason(run):
    energy = by_name(run([("", FAKE)]))["energy/fake/net_mj_per_image"]
    assert (energy.value, energy.source) == (None, "unavailable")
    assert "benchmark.energy_seconds=0" in energy.note


def test_p99_says_how_many_queries_it_needs(run):
    assert by_name(run([("", FAKE)]))["latency/fake/p99_ms"].note == "needs n >= 662 queries, got 8"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_warmup": 0}, r"benchmark\.num_warmup: 0"),
        ({"num_rounds": 1}, r"benchmark\.num_rounds: 1"),
        ({"num_queries": 3}, r"benchmark\.num_queries: 3 is less than one for each of 4"),
        ({"batch_size": 0}, r"benchmark\.batch_size: 0"),
        ({"throughput_batch_size": 0}, r"benchmark\.throughput_batch_size: 0"),
    ],
)
def test_settings_that_measure_nothing_are_refused(run, settings, text):
    with pytest.raises(ConfigError, match=text):
        run([("", FAKE)], **settings)


def test_two_candidates_of_one_name_are_refused(run):
    with pytest.raises(ConfigError, match="runtime: fake, fake must differ"):
        run([("", FAKE), ("", FAKE)])


def test_no_candidate_is_refused(run):
    with pytest.raises(ConfigError, match="nothing to measure"):
        run([])


def test_no_image_is_refused(run):
    with pytest.raises(ConfigError, match="images: there is none"):
        run([("", FAKE)], images=np.zeros((0, 1, 4, 4)))


def test_system_that_cannot_pin_refuses_an_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(BenchmarkError, match=r"hardware\.cpu_affinity=\[0\] cannot be set on"):
        worker.limit(Hardware(cpu_affinity=[0]))


def test_runtime_of_the_running_script_is_refused(run, monkeypatch):
    monkeypatch.setattr(FakeRuntime, "__module__", "__main__")
    with pytest.raises(BenchmarkError, match="move it to a module"):
        run([("", FAKE)])


def test_windows_is_refused(run, monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(BenchmarkError, match="needs Linux or macOS"):
        run([("", FAKE)])


def test_every_process_is_gone_afterwards(run, tmp_path):
    run([("", FAKE), ("baseline", FAKE)])
    jobs = {str(path) for path in (tmp_path / "bench").glob("*.job.json")}
    assert len(jobs) == 3
    alive = {
        argument
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists()
        for argument in path.read_text().split("\0")
    }
    assert not jobs & alive
