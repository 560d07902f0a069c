import pytest
from test_report_page import Reader, read_page

from medlite.report.card import build_card
from medlite.report.page import write_report_html
from medlite.report.robustness_section import corruption_chart, robustness_section
from medlite.report.wandb_sink import summary_of


def card_of(result):
    return {field.label: field for category in build_card(result) for field in category.fields}


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_page_shows_every_corruption_with_its_verdict(finished, tmp_path, task):
    result, _ = finished[task]
    write_report_html(result, None, tmp_path / "report.html")
    words = read_page(tmp_path / "report.html").words
    assert "Robustness: both models on worse images" in words
    assert {"gaussian noise", "blur", "severity 1", "severity 5", "none"} <= set(words)


def test_the_table_holds_what_the_report_says(run):
    report = run[0].robustness["onnxruntime"]
    reader = Reader()
    reader.feed(robustness_section({"onnxruntime": report}))
    item = next(i for i in report["items"] if i["name"] == "robustness/gaussian_noise")
    assert item["verdict"] == "FAIL"
    assert item["note"] in reader.words
    assert f"{item['difference']:#.3g}" in reader.words


def test_a_model_without_a_baseline_has_a_section_without_verdicts(run):
    report = run[0].robustness["onnxruntime"]
    alone = [{**row, "baseline": None, "difference": None} for row in report["rows"]]
    page = robustness_section(
        {"openvino": {**report, "clean_baseline": None, "rows": alone, "items": [],
                      "verdict": None}}
    )  # fmt: skip
    assert "chip" not in page
    assert "before</text>" not in page


def test_a_run_without_corruptions_has_no_section_and_says_so_in_its_card(run):
    result, _ = run
    result.robustness = {}
    assert robustness_section({}) == ""
    field = card_of(result)["Robustness to noise"]
    assert (field.provenance, field.note) == (
        "unavailable", "no such corruption is part of this run"
    )  # fmt: skip


def test_the_card_tells_the_worst_severity_and_what_failed(run):
    fields = card_of(run[0])
    noise = fields["Robustness to noise, onnxruntime"]
    assert noise.provenance == "measured"
    assert "on clean images" in noise.value
    assert noise.note == "gaussian noise, severity 5 of 5; 64 test images"
    judged = fields["Degrades no more than uncompressed, openvino"]
    assert judged.value == "FAIL"
    assert judged.note.endswith("fails: gaussian noise")
    assert fields["Robustness to resolution shift"].provenance == "unavailable"


def test_a_chart_of_unknown_scores_still_draws(run):
    report = run[0].robustness["onnxruntime"]
    rows = [{"severity": 3, "baseline": None, "compressed": None}]
    assert "<svg" in corruption_chart("blur", rows, {**report, "clean_compressed": None})


def test_wandb_gets_every_condition_under_its_key(run):
    summary = summary_of(run[0])
    key = "robustness/openvino/gaussian_noise/5"
    assert {f"{key}/dice", f"{key}/degradation", f"{key}/extra_degradation"} <= summary.keys()
    assert summary[f"baseline/{key}/dice"] > summary[f"{key}/dice"]
