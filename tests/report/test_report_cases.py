import pytest
from test_report_page import read_page

from medlite.report.card import build_card
from medlite.report.cases_section import exemplar_section, failure_section, odds_words
from medlite.report.page import write_report_html
from medlite.report.wandb_sink import case_pictures


def fields_of(result):
    return {field.label: field for category in build_card(result) for field in category.fields}


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_page_shows_exemplars_with_pictures_and_failures(finished, task):
    result, directory = finished[task]
    page = directory / "report.html"
    write_report_html(result, None, page)
    reader = read_page(page)
    assert {"Images that compression changed", "Failure modes"} <= set(reader.words)
    first = result.exemplars["openvino"]["exemplars"][0]
    assert {f"truth {first['position']}", "said", "says"} <= set(reader.words)
    assert sum(source.startswith("data:image/png") for source in reader.resources) >= 6
    page.unlink()


def test_pictures_that_are_gone_leave_the_tables(finished, tmp_path):
    result, _ = finished["classification"]
    section = exemplar_section(result, tmp_path)
    assert "<img" not in section
    assert "disagreement" in section


def test_an_odds_ratio_without_end_is_told_as_such():
    each = {"odds_ratio": None, "interval": [52.1, None]}
    assert odds_words(each) == "not finite (52.1 to \N{INFINITY})"


def test_the_groups_stand_with_their_change(finished, tmp_path):
    result, _ = finished["segmentation"]
    section = failure_section(result, tmp_path)
    group = result.failure_modes["openvino"]["groups"][-1]
    assert group["kind"] == "foreground"
    assert group["name"] in section
    assert f"{group['change']:#.3g}" in section


def test_the_card_names_over_represented_classes_and_the_worst_group(finished):
    fields = fields_of(finished["classification"][0])
    changed = fields["Changed most by compression, openvino"]
    assert changed.value == "20 of 400 images"
    assert changed.note.startswith("over-represented: Proliferative (odds ratio over ")
    assert fields["Failure modes, openvino"].value.startswith("class ")


def test_a_run_without_them_says_so(run):
    result, directory = run
    result.exemplars = result.failure_modes = {}
    assert exemplar_section(result, directory) == failure_section(result, directory) == ""
    assert fields_of(result)["Failure modes"].provenance == "unavailable"


def test_wandb_gets_the_pictures_that_are_there(run):
    assert case_pictures(run[0]) == {
        "exemplars/onnxruntime": "exemplars.npz", "exemplars/openvino": "exemplars.npz"
    }  # fmt: skip
