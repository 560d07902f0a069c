"""What disturbed a measurement is said, each cause by its own words."""

import os

import pytest

from medlite.bench import latency
from medlite.bench.latency import Timing, find_disturbances, round_sizes
from medlite.types import BenchmarkSettings

CORES = os.cpu_count() or 1


def timing(**changes):
    """Ten quiet rounds of twenty queries, two seconds long, with `changes`."""
    quiet = {
        "rounds_ms": [[10.0, 10.1, 9.9, 10.0] * 5 for _ in range(10)],
        "num_warmup": 40,
        "wall_seconds": 2.0,
        "steal_seconds": 0.0,
    }
    return Timing(**{**quiet, **changes})


class Warming:
    """A process whose latencies follow a script, one number for each block."""

    def __init__(self, medians):
        self.medians = list(medians)

    def ask(self, command, *, num_queries, batch_size):
        return {"samples_ns": [self.medians.pop(0)] * num_queries}


def test_quiet_rounds_are_stable():
    assert find_disturbances(timing()) == "stable"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_warm": False}, "still getting faster after 40 warm-up queries"),
        ({"rounds_ms": [[10.0] * 20] * 5 + [[13.0] * 20] * 5}, r"second half \+30% against"),
        ({"steal_seconds": 0.2 * CORES}, r"others took 10% of the machine \(steal\)"),
        ({"involuntary_switches": 300}, "150 involuntary context switches a second"),
        ({"load_average": 2.0 * CORES}, "load average"),
        ({"rounds_ms": [[10.0] * 15 + [50.0] * 5] * 10}, "90th percentile 5.0 times the median"),
    ],
)
def test_each_disturbance_is_named(changes, reason):
    with pytest.raises(AssertionError, match=reason):
        assert find_disturbances(timing(**changes)) == "stable"


def test_unknown_steal_is_absent_and_not_zero():
    rows = latency.summarise("", "fake", timing(steal_seconds=None))
    steal = next(row for row in rows if row.name == "contention/fake/steal_ratio")
    assert (steal.value, steal.source) == (None, "unavailable")


def test_instability_stands_in_the_note_of_the_latency():
    rows = latency.summarise("", "fake", timing(is_warm=False))
    notes = {row.name: row.note for row in rows}
    assert "unstable: still getting faster" in notes["latency/fake/p50_ms"]
    assert "unstable: still getting faster" in notes["latency/fake/p90_ms"]


def test_spread_of_the_median_holds_the_median():
    rows = latency.summarise("baseline/", "fake", timing())
    p50 = next(row for row in rows if row.name == "baseline/latency/fake/p50_ms")
    assert p50.spread[0] <= p50.value == 10.0 <= p50.spread[1]
    assert p50.n == 200


def test_warm_up_ends_when_the_latency_is_level():
    settings = BenchmarkSettings(num_warmup=5)
    warmed = latency.warm_up(Warming([100, 80, 60, 59, 1]), settings)
    assert (warmed.num_warmup, warmed.is_warm) == (20, True)


def test_warm_up_that_never_levels_is_said():
    falling = [1000 * 0.8**block for block in range(latency.MAX_WARMUP_BLOCKS)]
    warmed = latency.warm_up(Warming(falling), BenchmarkSettings(num_warmup=5))
    assert (warmed.num_warmup, warmed.is_warm) == (5 * latency.MAX_WARMUP_BLOCKS, False)


def test_rounds_share_the_queries_evenly():
    sizes = round_sizes(BenchmarkSettings(num_queries=23, num_rounds=5))
    assert sum(sizes) == 23
    assert max(sizes) - min(sizes) <= 1


def test_speedup_is_the_ratio_of_medians():
    speedup = latency.compare("fake", timing(), timing(rounds_ms=[[5.0] * 20] * 10))
    assert (speedup.name, speedup.value) == ("speedup/fake/ratio", 2.0)
    assert speedup.spread == (2.0, 2.0)
