import csv
import dataclasses
import shutil
import subprocess
import sys

import pytest
from fake_run import make_run

from medlite.errors import MedliteError, RecordError
from medlite.report.compare import compare, main, read_results
from medlite.report.comparison import ComparisonRow, mark_pareto, rows_of, sort_rows, tell_apart
from medlite.report.result import write_result
from medlite.types import Measurement


def make_row(**changes):
    values = {
        "run": "r", "dataset": "d", "model": "m", "compression": "none", "runtime": "openvino",
        "hardware": "host", "machine": "cpu", "metric_name": "dice", "metric": 0.9, "params": 1e5,
        "gmacs": 0.1, "p50_ms": 5.0, "p90_ms": 6.0, "speedup": None, "size_kib": 100.0,
        "peak_mib": 90.0, "int8_operators": 0.0, "safety": "PASS", "budgets": "fits",
        "settings": "s", "over_control": 0.01, "rarest_class": "c", "rare_sensitivity": 0.7,
        "ece": 0.05, "seed": 0,
    }  # fmt: skip
    return ComparisonRow(**{**values, **changes})


def pareto(*rows):
    return [row.is_pareto for row in mark_pareto(rows)]


def test_a_row_is_pareto_optimal_unless_another_is_no_worse_and_somewhere_better():
    best = make_row(metric=0.95)
    small = make_row(metric=0.8, size_kib=50.0)
    fast = make_row(metric=0.8, p50_ms=2.0)
    frugal = make_row(metric=0.8, peak_mib=40.0)
    beaten = make_row(metric=0.8)
    assert pareto(best, small, fast, frugal, beaten) == [True, True, True, True, False]


def test_equal_rows_are_both_optimal():
    assert pareto(make_row(), make_row(run="another")) == [True, True]


def test_a_row_without_a_measured_number_neither_beats_nor_is_marked():
    assert pareto(make_row(), make_row(p50_ms=None, metric=0.99)) == [True, False]


def test_rows_of_different_data_hardware_or_machines_are_not_ranked_together():
    worse = {"metric": 0.1, "p50_ms": 50.0, "size_kib": 900.0}
    others = [make_row(**worse, **{key: "x"}) for key in ("dataset", "hardware", "machine")]
    assert pareto(make_row(), *others) == [True] * 4


def test_runs_of_the_same_steps_are_told_apart_by_what_they_set_differently(finished):
    plain, _ = finished["segmentation"]

    def run(**options):
        compression = {
            step: {"_target_": "t", "epochs": 3, **of_step} for step, of_step in options.items()
        }
        choices = {**plain.choices, "compression": ",".join(options) or "none"}
        return dataclasses.replace(
            plain, choices=choices, config={**plain.config, "compression": compression}
        )

    runs = [
        run(prune={"ratio": 0.5}),
        run(prune={"ratio": 0.9}),
        run(prune={"ratio": 0.5}, qat={"bits": 8}),
        run(prune={"ratio": 0.5}, qat={"bits": 7}),
        run(qat={"bits": 8}),
        run(),
    ]
    assert tell_apart(runs) == [
        "prune (ratio=0.5)",
        "prune (ratio=0.9)",
        "prune,qat (qat.bits=8)",
        "prune,qat (qat.bits=7)",
        "qat",
        "none",
    ]


def test_rows_are_sorted_best_first_and_unknown_last():
    rows = [make_row(p50_ms=3.0), make_row(p50_ms=None), make_row(p50_ms=1.0)]
    assert [row.p50_ms for row in sort_rows(rows, "p50_ms")] == [1.0, 3.0, None]
    rows = [make_row(metric=0.3), make_row(metric=0.7)]
    assert [row.metric for row in sort_rows(rows, "metric")] == [0.7, 0.3]


def test_an_unknown_column_is_answered_with_the_closest():
    with pytest.raises(MedliteError, match=r"--sort p50: no such column, did you mean 'p50_ms'"):
        sort_rows([], "p50")


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("two_runs")
    for name, runtimes in {"one": ("onnxruntime", "openvino"), "two": ("openvino",)}.items():
        directory = root / "runs" / name
        directory.mkdir(parents=True)
        result = make_run(directory, runtimes=runtimes)
        result.name = name
        write_result(result, directory)
    return root


@pytest.fixture
def outputs(two_runs, tmp_path):
    return shutil.copytree(two_runs, tmp_path / "outputs")


def test_there_is_a_row_for_each_run_and_runtime(outputs):
    results, broken = read_results([outputs])
    rows = compare(results)
    assert [(row.run, row.runtime) for row in rows] == [
        ("one", "onnxruntime"),
        ("one", "openvino"),
        ("two", "openvino"),
    ]
    assert broken == []
    first = rows[0]
    assert (first.dataset, first.compression, first.metric_name) == ("lidc_nodules", "qat", "dice")
    assert first.params == 49457
    assert first.int8_operators == 31
    assert first.speedup > 1
    assert (first.safety, first.budgets) == ("PASS", "fits")
    assert rows[1].budgets == "missed"


def test_a_broken_result_is_listed_and_does_not_stop_the_others(outputs, capsys):
    broken = outputs / "runs" / "three" / "result.json"
    broken.parent.mkdir()
    broken.write_text('{"schema_ver')
    assert main([str(outputs)]) == 1
    printed = capsys.readouterr().out.replace("\n", "")
    assert "3 results" in printed
    assert "not read: " in printed
    assert "is not whole JSON" in printed
    assert "is not whole JSON" in (outputs / "compare.html").read_text()


def test_the_table_is_printed_and_written_as_csv_and_html(outputs, capsys):
    assert main([str(outputs), "--sort", "size_kib"]) == 0
    assert "ultralight_vm_unet" in capsys.readouterr().out
    with (outputs / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert float(rows[0]["metric"]) > 0.5
    assert rows[0]["safety"] == "PASS"
    html = (outputs / "compare.html").read_text()
    assert html.count("<tr>") == 4
    assert "http" not in html


def test_csv_and_html_go_where_they_are_told(outputs, tmp_path):
    targets = [tmp_path / "a.csv", tmp_path / "b.html"]
    options = ["--csv", str(targets[0]), "--html", str(targets[1])]
    assert main([str(outputs / "runs" / "two" / "result.json"), *options]) == 0
    assert all(path.exists() for path in targets)


def test_the_table_is_written_for_documents(outputs, tmp_path):
    assert main([str(outputs), "--markdown", str(tmp_path / "table.md")]) == 0
    first, _, head, rule, *rows, _, remark = (tmp_path / "table.md").read_text().splitlines()
    assert remark.startswith("One seed: no ranking.")
    assert first.startswith("dataset lidc_nodules, model ultralight_vm_unet")
    assert head.count("|") == rule.count("|")
    assert {row.count("|") for row in rows} == {head.count("|")}
    assert len(rows) == 3


def test_what_a_net_has_over_its_control_is_a_column(tmp_path):
    result = make_run(tmp_path, runtimes=("onnxruntime", "openvino"))
    items = [{"name": "safety/metric_drop", "difference": 0.03}]
    result.control = {"openvino": {"items": items}}
    assert [row.over_control for row in rows_of(result)] == [None, -0.03]


def test_columns_are_chosen_and_what_tells_rows_apart_stays(outputs, tmp_path, capsys):
    page, csv = tmp_path / "table.html", tmp_path / "all.csv"
    words = ["--markdown", str(tmp_path / "table.md"), "--html", str(page), "--csv", str(csv)]
    assert main([str(outputs), "--columns", "safety", "metric", *words]) == 0
    head = (tmp_path / "table.md").read_text().splitlines()[2]
    assert head == "| runtime | safety | metric |"
    for shown in (capsys.readouterr().out, page.read_text()):
        assert "Pareto *" not in shown
        assert "peak MiB" not in shown
    assert "peak_mib" in csv.read_text()


def test_a_misspelt_column_gets_the_closest(outputs):
    with pytest.raises(MedliteError, match="--columns: no column saftey, did you mean 'safety'"):
        main([str(outputs), "--columns", "saftey"])


def test_a_declared_number_is_not_compared(outputs):
    directory = outputs / "runs" / "two"
    result = make_run(directory, runtimes=("openvino",))
    for position, row in enumerate(result.measurements):
        if row.name == "size/openvino/disk_kib":
            result.measurements[position] = Measurement(
                name=row.name, value=1.0, unit="KiB", source="estimated", note="guess"
            )
    write_result(result, directory)
    rows = compare(read_results([directory])[0])
    assert rows[0].size_kib is None
    assert not rows[0].is_pareto


def test_nothing_to_compare_says_where_it_looked(tmp_path):
    with pytest.raises(RecordError, match=rf"no result\.json below {tmp_path}"):
        read_results([tmp_path])
    with pytest.raises(RecordError, match="absent: no such file or directory"):
        read_results([tmp_path / "absent"])


def test_compare_starts_without_heavy_packages():
    code = (
        "import sys, medlite.report.compare; "
        "heavy = {'torch', 'numpy', 'pandas', 'wandb', 'matplotlib'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
