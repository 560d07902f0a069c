import pytest
from test_report_page import Reader, read_page

from medlite.report.card import build_card
from medlite.report.page import write_report_html
from medlite.report.shortcut_section import shortcut_section
from medlite.report.wandb_sink import summary_of


def fields_of(result):
    return {field.label: field for category in build_card(result) for field in category.fields}


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("segmentation", "the annotated finding is hidden"),
        ("classification", "everything but the outer eighth is hidden"),
    ],
)
def test_page_card_and_summary_tell_what_is_suspect(finished, tmp_path, task, words):
    result, _ = finished[task]
    write_report_html(result, None, tmp_path / "report.html")
    found = read_page(tmp_path / "report.html").words
    assert "Shortcuts: what is told without the finding" in found
    assert words in found
    (row,) = result.shortcuts["onnxruntime"]["rows"]
    assert row["is_suspect"]
    assert "SUSPECT" in found
    field = fields_of(result)[f"Shortcuts, {words}, onnxruntime"]
    assert field.value.startswith("SUSPECT: ")
    score = result.shortcuts["onnxruntime"]["score"]
    name = f"shortcut/onnxruntime/{row['probe']}_{score}"
    assert summary_of(result)[name] == row["compressed"]


def test_the_table_holds_both_models_and_the_limit(finished):
    report = finished["classification"][0].shortcuts["onnxruntime"]
    reader = Reader()
    reader.feed(shortcut_section({"onnxruntime": report}))
    (row,) = report["rows"]
    for value in (row["baseline"], row["compressed"], report["clean_compressed"]):
        assert f"{value:#.3g}" in reader.words
    assert "0.5" in reader.words


def test_what_is_no_fault_is_only_shown(finished):
    report = finished["classification"][0].shortcuts["onnxruntime"]
    rows = [{**row, "limit": None, "is_suspect": False} for row in report["rows"]]
    page = shortcut_section({"onnxruntime": {**report, "rows": rows}})
    assert ">shown<" in page
    assert "SUSPECT" not in page


def test_a_run_without_probes_says_so(finished):
    result, _ = finished["classification"]
    kept, result.shortcuts = result.shortcuts, {}
    try:
        assert fields_of(result)["Shortcuts"].note == "switched off in this run"
    finally:
        result.shortcuts = kept
