import csv
import dataclasses
import shutil
import subprocess
import sys

import pytest
from fake_run import make_run

from medlite import __version__
from medlite.errors import MedliteError, RecordError
from medlite.report.compare import compare, main, read_results
from medlite.report.comparison import (
    ComparisonRow,
    level_latencies,
    mark_pareto,
    rows_of,
    sort_rows,
)
from medlite.report.comparison_table import as_csv, lines_of_runs, with_columns
from medlite.report.environment import package_versions
from medlite.report.result import write_result
from medlite.report.sameness import net_digest, settings_digest, tell_apart
from medlite.types import Measurement


def make_row(**changes):
    values = {
        "run": "r", "dataset": "d", "model": "m", "compression": "none", "runtime": "openvino",
        "hardware": "host", "machine": "cpu", "metric_name": "dice", "metric": 0.9, "params": 1e5,
        "gmacs": 0.1, "p50_ms": 5.0, "p90_ms": 6.0, "speedup": None, "size_kib": 100.0,
        "peak_mib": 90.0, "int8_operators": 0.0, "safety": "PASS", "failed": (), "budgets": "fits",
        "settings": "s", "over_control": 0.01, "rarest_class": "c", "rare_sensitivity": 0.7,
        "ece": 0.05, "seed": 0, "images": "i", "net": "n",
        "baseline_p50_ms": None, "levelled_p50_ms": 5.0,
    }  # fmt: skip
    return ComparisonRow(**{**values, **changes})


def pareto(*rows):
    return [row.is_pareto for row in mark_pareto(rows)]


def test_a_row_is_pareto_optimal_unless_another_is_no_worse_and_somewhere_better():
    best = make_row(metric=0.95)
    small = make_row(metric=0.8, size_kib=50.0)
    fast = make_row(metric=0.8, levelled_p50_ms=2.0)
    frugal = make_row(metric=0.8, peak_mib=40.0)
    beaten = make_row(metric=0.8)
    assert pareto(best, small, fast, frugal, beaten) == [True, True, True, True, False]


def test_equal_rows_are_both_optimal():
    assert pareto(make_row(), make_row(run="another")) == [True, True]


def test_a_row_without_a_measured_number_neither_beats_nor_is_marked():
    assert pareto(make_row(), make_row(levelled_p50_ms=None, metric=0.99)) == [True, False]


def test_rows_of_different_data_hardware_or_machines_are_not_ranked_together():
    worse = {"metric": 0.1, "levelled_p50_ms": 50.0, "size_kib": 900.0}
    others = [make_row(**worse, **{key: "x"}) for key in ("images", "hardware", "machine")]
    assert pareto(make_row(), *others) == [True] * 4


def test_latencies_of_one_net_stand_on_one_footing():
    """The uncompressed net took 4, 6 and 20 ms: the last while others used the machine."""
    rows = [
        make_row(compression="none (train.epochs=5)", p50_ms=4.0),
        make_row(compression="ptq", p50_ms=3.0, baseline_p50_ms=6.0, speedup=2.0),
        make_row(compression="qat", p50_ms=10.0, baseline_p50_ms=20.0, speedup=2.0),
        make_row(compression="prune", p50_ms=7.0),
        make_row(compression="ptq", net="other", p50_ms=3.0, baseline_p50_ms=9.0, speedup=3.0),
        make_row(p50_ms=None),
    ]
    levelled = [row.levelled_p50_ms for row in level_latencies(rows)]
    assert levelled == [6.0, 3.0, 3.0, 7.0, 3.0, None]


def test_nets_of_other_widths_sizes_threads_and_runtimes_are_other_nets(finished):
    plain, _ = finished["segmentation"]
    config = plain.config
    others = [
        variant(plain, model={"width": 64}),
        variant(plain, dataset={"image_size": [128, 128]}),
        dataclasses.replace(plain, config={**config, "hardware": {"num_threads": 9}}),
        dataclasses.replace(plain, config={**config, "runtime": {"openvino": {"hint": "bf16"}}}),
        dataclasses.replace(plain, config={**config, "benchmark": {"batch_size": 8}}),
    ]
    assert len({net_digest(run, "openvino") for run in (plain, *others)}) == 6
    same = variant(plain, train={"epochs": 99}, seed=3, prune={"ratio": 0.5})
    assert net_digest(same, "openvino") == net_digest(plain, "openvino")


def variant(result, *, model=None, train=None, dataset=None, seed=None, **steps):
    """The run with other options, a word for each step of its compression."""
    compression = {name: {"_target_": "t", **options} for name, options in steps.items()}
    config = {**result.config, "compression": compression}
    if train is not None:
        config["train"] = {**config.get("train", {}), **train}
    if model is not None:
        config["model"] = {**config.get("model", {}), **model}
    if seed is not None:
        config["seed"] = seed
    return dataclasses.replace(
        result,
        choices={**result.choices, "compression": ",".join(steps) or "none"},
        config=config,
        dataset={**result.dataset, **(dataset or {})},
    )


def names_of(runs):
    return tell_apart([(run, "openvino") for run in runs])


def test_runs_of_the_same_steps_are_told_apart_by_what_they_set_differently(finished):
    plain, _ = finished["segmentation"]
    runs = [
        variant(plain, prune={"ratio": 0.5}),
        variant(plain, prune={"ratio": 0.9}),
        variant(plain, prune={"ratio": 0.5}, qat={"bits": 8}),
        variant(plain, prune={"ratio": 0.5}, qat={"bits": 7}),
        variant(plain, qat={"bits": 8}),
        variant(plain),
    ]
    assert [each.compression for each in names_of(runs)] == [
        "prune (ratio=0.5)",
        "prune (ratio=0.9)",
        "prune,qat (qat.bits=8)",
        "prune,qat (qat.bits=7)",
        "qat",
        "none",
    ]


def test_runs_that_differ_elsewhere_are_told_apart_too(finished):
    plain, _ = finished["segmentation"]
    wide, longer = names_of([variant(plain, model={"width": 64}), variant(plain, seed=3)])[:2]
    assert wide.model.endswith("(width=64)")
    assert "width" not in longer.model
    runs = [variant(plain, train={"epochs": epochs}, prune={}) for epochs in (5, 15)]
    assert [each.compression for each in names_of(runs)] == [
        "prune (train.epochs=5)",
        "prune (train.epochs=15)",
    ]


def test_runs_on_other_images_are_told_apart_where_the_record_has_no_paths(finished):
    plain, _ = finished["segmentation"]
    other = variant(plain, dataset={"num_samples": {"train": 9, "val": 3, "test": 3}})
    names = names_of([variant(plain), other])
    assert names[0] != names[1]
    assert names[0].compression == f"none (settings {settings_digest(variant(plain), 'openvino')})"
    assert len({run.images for each in (plain, other) for run in rows_of(each)}) == 2


def test_what_follows_the_training_does_not_tell_runs_apart(finished):
    plain, _ = finished["segmentation"]
    runs = [
        variant(plain, train={"epochs": n}, prune={"epochs": n, "ratio": 0.5}) for n in (12, 30)
    ]
    runs[1].choices["model"] = "unet"
    assert {each.compression for each in names_of(runs)} == {"prune"}


def test_the_order_of_the_steps_and_a_teachers_file_part_runs(finished):
    plain, _ = finished["segmentation"]
    orders = [variant(plain, prune={}, low_rank={}), variant(plain, low_rank={}, prune={})]
    files = [variant(plain, distill={"teacher": "unet@<path>"}) for _ in range(2)]
    for sha256, run in zip("ab", files, strict=True):
        run.learned_from = [sha256]
    for pair in (orders, files):
        assert len({settings_digest(run, "openvino") for run in pair}) == 2


def test_runs_of_another_version_are_no_further_seeds(finished):
    plain, _ = finished["segmentation"]
    assert package_versions()["medlite"] == __version__
    versions = [
        dataclasses.replace(plain, environment={**plain.environment, "packages": {"medlite": v}})
        for v in ("0.2.0", "0.3.0")
    ]
    assert len({settings_digest(run, "openvino") for run in versions}) == 2


def test_what_decides_no_row_does_not_part_runs(finished):
    plain, _ = finished["segmentation"]
    own = settings_digest(plain, "openvino")
    longer = {"benchmark": {**plain.config["benchmark"], "num_queries": 999, "each_step": False}}
    for others in ({"seed": 4}, {"name": "a"}, {"robustness": {"enabled": False}}, longer):
        other = dataclasses.replace(plain, config={**plain.config, **others})
        assert settings_digest(other, "openvino") == own
    more = {**plain.config, "runtime": {"executorch": {"_target_": "t"}}}
    assert settings_digest(dataclasses.replace(plain, config=more), "openvino") == own
    assert settings_digest(variant(plain, train={"epochs": 99}), "openvino") != own


def test_accelerators_are_other_machines(finished):
    result = dataclasses.replace(finished["segmentation"][0])
    result.environment = {**result.environment, "cpu": "c", "gpu": "g"}
    machines = []
    for device in ("cpu", "cuda"):
        result.config = {**result.config, "hardware": {"device": device}}
        machines.append(rows_of(result)[0].machine)
    assert machines == ["c", "c + g"]


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
    first, _, *lines = (tmp_path / "table.md").read_text().splitlines()
    (head, rule, *rows), remarks = lines[:5], " ".join(lines[5:])
    assert all(words in remarks for words in ("Pareto *: ", "Levelled p50: ", "No ranking: "))
    assert first.startswith("dataset lidc_nodules, model ultralight_vm_unet")
    assert head.count("|") == rule.count("|") > 3
    assert {row.count("|") for row in rows} == {head.count("|")}


def test_what_a_net_has_over_its_control_is_a_column(tmp_path):
    result = make_run(tmp_path, runtimes=("onnxruntime", "openvino"))
    for difference, gain in ((0.03, -0.03), (0.0, 0.0), (None, None)):
        items = [{"name": "safety/metric_drop", "difference": difference}]
        result.control = {"openvino": {"items": items}}
        assert [row.over_control for row in rows_of(result)] == [None, gain]


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


def test_what_the_gate_failed_is_named_where_it_is_asked_for(finished):
    result = dataclasses.replace(finished["segmentation"][0])
    items = [
        {"name": f"safety/{name}", "verdict": verdict}
        for name, verdict in (
            ("metric_drop", "PASS"),
            ("sensitivity_drop/nodule", "FAIL"),
            ("ece_increase", "INCONCLUSIVE"),
        )
    ]
    result.safety = {"openvino": {"verdict": "FAIL", "items": items}}
    row = next(row for row in rows_of(result) if row.runtime == "openvino")
    assert row.failed == ("sensitivity drop/nodule",)
    (line,) = with_columns(lines_of_runs([row]), ["failed"])
    assert line.texts["failed"] == "sensitivity drop/nodule"
    (written,) = csv.DictReader(as_csv([line]).splitlines())
    assert written["failed"] == "sensitivity drop/nodule"


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
