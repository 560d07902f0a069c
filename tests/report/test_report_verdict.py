"""When compression brought nothing, and which class lost most."""

import pytest

from medlite.report.gains import describe_gain, gains_of
from medlite.report.lineage import gains_table, worst_loss
from medlite.report.verdict import (
    describe_arithmetic,
    summarise_verdict,
    worst_of,
)
from medlite.types import Measurement


def found(*, ratio, spread=None, before=100.0, after=100.0, runtime="openvino"):
    rows = [
        Measurement(name=f"latency/{runtime}/p50_ms", value=1.0, unit="ms"),
        Measurement(name=f"speedup/{runtime}/ratio", value=ratio, unit="ratio", spread=spread),
        Measurement(name=f"baseline/size/{runtime}/disk_kib", value=before, unit="KiB"),
        Measurement(name=f"size/{runtime}/disk_kib", value=after, unit="KiB"),
    ]
    return gains_of(rows, [runtime])


def test_neither_faster_nor_smaller_is_no_gain():
    text = describe_gain(found(ratio=0.98, spread=(0.95, 1.02)), {})
    assert text == "no gain on this hardware: openvino"


@pytest.mark.parametrize(
    "figures",
    [
        {"ratio": 1.0, "after": 99.0},
        {"ratio": 1.2},
        {"ratio": 1.2, "spread": (1.05, 1.3), "after": 300.0},
    ],
)
def test_faster_or_smaller_is_a_gain(figures):
    assert describe_gain(found(**figures), {}) == ""


def test_a_speed_up_that_could_be_chance_is_no_gain():
    assert describe_gain(found(ratio=1.2, spread=(0.9, 1.5)), {}) != ""


def test_a_few_bytes_less_are_no_gain():
    """An OpenVINO file of the same net is shorter by the digits of its constants' names."""
    figures = {"ratio": 1.0, "before": 4478.18, "after": 4477.28}
    assert describe_gain(found(**figures), {}) == "no gain on this hardware: openvino"


def test_smaller_and_slower_is_told_as_slower():
    figures = {"ratio": 0.37, "spread": (0.36, 0.37), "after": 38.0}
    assert describe_gain(found(**figures), {}) == "slower than before on openvino"
    assert describe_gain(found(ratio=0.9, spread=(0.7, 1.1), after=38.0), {}) == ""


def test_without_a_baseline_nothing_is_said():
    alone = [Measurement(name="latency/openvino/p50_ms", value=1.0, unit="ms")]
    assert describe_gain(gains_of(alone, ["openvino"]), {}) == ""


def test_the_steps_that_brought_nothing_are_named_where_there_are_several():
    fast, idle = found(ratio=2.0, after=50.0), found(ratio=1.0)
    told = describe_gain(fast, {"distill": idle, "prune": fast})
    assert told == "neither smaller nor faster by distill on openvino"
    slow = found(ratio=0.5, spread=(0.4, 0.6), after=50.0)
    assert describe_gain(fast, {"prune": fast, "qat": slow}) == "slower by qat on openvino"
    both = found(ratio=0.5, spread=(0.4, 0.6))
    assert describe_gain(both, {}) == "no gain on this hardware: openvino"
    assert describe_gain(fast, {"prune": fast, "qat": fast}) == ""
    assert describe_gain(idle, {"distill": idle}) == "no gain on this hardware: openvino"


def test_the_lineage_shows_what_each_step_brought():
    lineage = [
        {"stage": "train", "gains": {}},
        {"stage": "distill", "gains": found(ratio=1.0, spread=(0.9, 1.1))},
        {"stage": "prune", "gains": gains_of([], ["openvino"], reason="no such operator")},
    ]
    shown = gains_table(lineage)
    assert shown.count("no gain") == 1
    assert "1 (0.900 to 1.10) times as fast, 1 of the size" in shown
    assert "not timed: no such operator" in shown
    assert gains_table(lineage[:1]) == ""


def test_a_graph_that_a_runtime_computes_in_float_is_not_really_int8():
    operators = {
        "onnxruntime": {"int8:QLinearConv": 3, "Relu": 1},
        "openvino": {"Convolution": 3, "FakeQuantize": 4},
        "baseline/openvino": {"Convolution": 3},
    }
    told = describe_arithmetic(["int8", "int8"], operators)
    assert told == "not really INT8 on openvino: no operator computes in 8 bits"
    operators["openvino"]["int8:Convolution"] = 2
    told = describe_arithmetic(["int8", "int8"], operators)
    assert told == "operators in 8 bits: 3 on onnxruntime, 2 on openvino"
    assert describe_arithmetic(["fp32"], operators) == describe_arithmetic(["int8"], {}) == ""


def test_the_summary_says_so():
    told = summarise_verdict(budgets=[], safety="PASS", parity="PASS", gain="no gain on this x")
    assert told.endswith("parity with torch: PASS; no gain on this x.")


def test_the_summary_names_the_runtimes_that_failed():
    told = summarise_verdict(
        budgets=[], safety="INCONCLUSIVE", parity="PASS", unmeasured=["a", "b"]
    )
    assert "the deployed model could not be measured on a, b;" in told


@pytest.mark.parametrize(
    ("verdicts", "is_complete", "worst"),
    [
        (["PASS", "FAIL", "INCONCLUSIVE"], True, "FAIL"),
        (["PASS", "PASS"], True, "PASS"),
        (["PASS"], False, "INCONCLUSIVE"),
        (["FAIL"], False, "FAIL"),
        ([], False, "INCONCLUSIVE"),
        ([], True, "not compared"),
    ],
)
def test_what_was_not_judged_is_at_best_inconclusive(verdicts, is_complete, worst):
    assert worst_of(verdicts, is_complete=is_complete, nothing="not compared") == worst


def test_the_class_that_lost_most_is_named():
    before = {"scores": {"sensitivity/a": 0.9, "sensitivity/b": 0.8, "dice": 0.9}}
    after = {"scores": {"sensitivity/a": 0.85, "sensitivity/b": 0.5, "dice": 0.1}}
    assert worst_loss(before, after) == "b: sensitivity -0.300"
    assert worst_loss(after, before) == ""
    assert worst_loss(None, after) == ""
    assert worst_loss(before, {"scores": {"sensitivity/a": None}}) == ""
