"""Runs of several seeds as one row."""

import csv
import math
import re
from itertools import combinations

import pytest
from fake_run import make_run
from test_report_compare import make_row

from medlite.__main__ import _show_sweep
from medlite.report.compare import main
from medlite.report.comparison_table import (
    as_html,
    as_markdown,
    frontiers,
    lines_of_runs,
    lines_of_seeds,
    print_table,
)
from medlite.report.frontier import Result, frontier_chart
from medlite.report.result import write_result
from medlite.report.seeds import summarise_seeds
from medlite.report.tables import chip


def test_runs_of_the_same_settings_become_one_row_with_an_interval():
    rows = [make_row(seed=seed, metric=m) for seed, m in enumerate((0.90, 0.92, 0.94))]
    (summary,) = summarise_seeds(rows)
    assert summary.num_seeds == 3
    assert summary.row.metric == pytest.approx(0.92)
    # Student's t with 2 degrees of freedom, from a printed table.
    assert summary.half_widths["metric"] == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-6)
    assert summary.deviations["metric"] == pytest.approx(0.02)
    assert summary.text("metric") == "0.920 \N{PLUS-MINUS SIGN} 0.0497"


def test_other_settings_models_and_runtimes_stay_apart():
    changes = ({}, {"settings": "t"}, {"model": "n"}, {"runtime": "x"}, {"dataset": "e"})
    assert len(summarise_seeds([make_row(**change) for change in changes])) == 5


def test_a_run_that_was_repeated_is_no_second_sample():
    (summary,) = summarise_seeds([make_row(metric=0.5), make_row(metric=0.7)])
    assert (summary.num_seeds, summary.row.metric) == (1, 0.7)
    assert summary.half_widths["metric"] is None


def test_a_number_that_one_seed_lacks_has_no_mean():
    (summary,) = summarise_seeds([make_row(seed=0, speedup=2.0), make_row(seed=1)])
    assert summary.row.speedup is None
    assert summary.text("speedup") == "-"


def test_verdicts_are_counted_and_the_frontier_is_that_of_the_means():
    good = [make_row(seed=s, metric=m) for s, m in ((0, 0.9), (1, 0.8))]
    bad = [
        make_row(seed=s, metric=0.7, settings="t", safety=v) for s, v in ((0, "FAIL"), (1, "PASS"))
    ]
    first, second = summarise_seeds([*good, *bad])
    assert (first.row.safety, second.row.safety) == ("2 PASS", "1 FAIL, 1 PASS")
    assert (first.row.is_pareto, second.row.is_pareto) == (True, False)


def test_what_failed_is_counted_over_the_seeds():
    lost = ("metric drop", "sensitivity drop/rare")
    rows = [make_row(seed=seed, failed=each) for seed, each in enumerate(((), lost[:1], lost))]
    (summary,) = summarise_seeds(rows)
    assert summary.text("failed") == "2 metric drop, 1 sensitivity drop/rare"
    assert summarise_seeds(rows[:1])[0].text("failed") == "-"
    assert summarise_seeds(rows[2:])[0].text("failed") == "metric drop, sensitivity drop/rare"


def test_budgets_that_one_seed_misses_are_not_called_met():
    (summary,) = summarise_seeds(
        [make_row(seed=seed, budgets=each) for seed, each in enumerate(("fits", "missed", "fits"))]
    )
    assert summary.row.budgets == "2 fits, 1 missed"


def test_the_verb_puts_seeds_together(tmp_path, capsys):
    result = make_run(tmp_path, runtimes=("onnxruntime",))
    for seed in range(2):
        directory = tmp_path / f"run{seed}"
        directory.mkdir()
        result.config["seed"] = seed
        write_result(result, directory)
    assert main([str(tmp_path), "--over-seeds"]) == 0
    printed = capsys.readouterr().out
    assert "1 results" in printed
    assert "No ranking" not in printed
    with (tmp_path / "compare.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["num_seeds"] == "2"
    assert float(row["metric_half_width"]) == float(row["metric_sd"]) == 0.0
    assert "(sd 0)" in printed
    assert main([str(tmp_path)]) == 0
    assert "No ranking" in capsys.readouterr().out


def test_a_table_that_rests_on_one_seed_says_so_wherever_it_is_shown(capsys):
    rows = [make_row(seed=0), make_row(seed=1), make_row(seed=0, compression="qat", settings="t")]
    for lines in (lines_of_runs(rows), lines_of_seeds(rows, "metric")):
        print_table(lines, [])
        for shown in (capsys.readouterr().out, as_html(lines, []), as_markdown(lines)):
            assert "No ranking" in shown
    several = lines_of_seeds(rows[:2], "metric")
    assert "No ranking" not in as_html(several, []) + as_markdown(several)


def test_a_sweep_ends_in_a_table_of_its_own_runs(tmp_path, capsys):
    runs = [tmp_path / "runs" / name for name in ("one", "two", "stopped", "older")]
    runs[0].mkdir(parents=True)
    result = make_run(runs[0], runtimes=("onnxruntime",))
    for seed, directory in enumerate(runs):
        directory.mkdir(parents=True, exist_ok=True)
        result.config["seed"] = seed
        write_result(result, directory)
    (runs[2] / "result.json").unlink()
    _show_sweep(runs[:3])
    assert "1 results" in capsys.readouterr().out
    (table,) = (tmp_path / "sweeps").glob("sweep-*.csv")
    with table.open() as file:
        assert [row["num_seeds"] for row in csv.DictReader(file)] == ["2"]
    _show_sweep(runs[:1])
    assert capsys.readouterr().out == "", "a single job has shown its result already"


def test_the_chart_marks_the_frontier_and_the_verdict():
    chart = frontier_chart(
        "d on openvino",
        [
            Result(make_row(compression="qat", is_pareto=True), half_width=0.125),
            Result(
                make_row(
                    compression="prune", safety="1 FAIL, 2 PASS", metric=0.5, levelled_p50_ms=2.0
                )
            ),
            Result(make_row(compression="lost", metric=None)),
        ],
    )
    assert chart.count("<circle") == 2
    assert chart.count('stroke="#1d7f4e"') == 1, "one interval, of the one that has it"
    assert ">1</text>" in chart, "the axis reaches to the end of the interval"
    assert chart.count('r="6" fill="#1d7f4e"') == 1
    assert chart.count('r="3" fill="#b3261e"') == 1


def test_other_scores_machines_and_images_have_charts_of_their_own():
    changes = ({}, {"metric_name": "auc"}, {"hardware": "cuda"}, {"machine": "n"}, {"images": "j"})
    rows = [make_row(compression=step, **each) for each in changes for step in ("none", "qat")]
    charts = frontiers(lines_of_runs(rows))
    assert [chart.count("<circle") for chart in charts] == [2] * 5
    assert sum(">auc<" in chart for chart in charts) == 1


def test_words_in_a_crowd_stay_in_the_picture_and_apart():
    rows = [
        make_row(compression=f"distill+prune+qat {n}", levelled_p50_ms=p50)
        for n in range(12)
        for p50 in (0.1, 9.0)
    ]
    chart = frontier_chart("d", [Result(row) for row in rows])
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>distill', chart)
    places = [tuple(map(float, each)) for each in found]
    assert len(places) == 24
    assert all(0 <= x <= 860 - 19 * 6 and 20 <= y <= 340 for x, y in places)
    for (x, y), (other_x, other_y) in combinations(places, 2):
        assert abs(x - other_x) > 18 * 6 or abs(y - other_y) >= 11.9


def test_one_result_is_no_frontier():
    assert frontier_chart("d", [Result(make_row()), Result(make_row(levelled_p50_ms=None))]) == ""


def test_verdicts_of_seeds_have_the_colour_of_the_worst():
    colours = {words: re.search(r"chip (\w+)", chip(words))[1] for words in (
        "3 PASS", "2 PASS, 1 FAIL", "2 PASS, 1 INCONCLUSIVE", "3 not compared", "fits"
    )}  # fmt: skip
    assert list(colours.values()) == ["pass", "fail", "open", "quiet", "pass"]
