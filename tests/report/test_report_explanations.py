import numpy as np
import pytest
from test_report_page import Reader, read_page

from medlite.report.card import build_card
from medlite.report.explanation_section import HEAT, explanation_section, heat, read_heat
from medlite.report.page import write_report_html
from medlite.report.wandb_sink import summary_of


def fields_of(result):
    return {field.label: field for category in build_card(result) for field in category.fields}


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_page_shows_agreement_and_maps(finished, task):
    result, directory = finished[task]
    page = directory / "report.html"
    write_report_html(result, None, page)
    reader = read_page(page)
    assert "Explainability: what decisions rest on" in reader.words
    row = result.explanations["rows"][0]
    assert f"{row['rank_correlation']:#.3g}" in reader.words
    assert {"grad cam, onnxruntime, uncompressed", "no attention"} <= set(reader.words)
    page.unlink()


def test_a_section_without_its_pictures_keeps_the_table(finished, tmp_path):
    report = finished["classification"][0].explanations
    section = explanation_section(report, tmp_path)
    assert "<img" not in section
    reader = Reader()
    reader.feed(section)
    assert "shows the image rather than the model: decides nothing" in reader.words


def test_nothing_explained_has_no_section():
    assert explanation_section({}, None) == ""


def test_card_and_summary_hold_the_correlation_and_what_does_not_apply(finished):
    result, _ = finished["classification"]
    row = result.explanations["rows"][0]
    fields = fields_of(result)
    assert fields["Saliency, grad cam, onnxruntime"].note.endswith("decides nothing")
    assert fields["Saliency, rollout, torch"].provenance == "unavailable"
    name = "explainability/onnxruntime/grad_cam/rank_correlation"
    assert summary_of(result)[name] == row["rank_correlation"]


def test_what_is_salient_is_coloured():
    image = np.zeros((1, 200, 200), np.float32)
    saliency = np.zeros((200, 200))
    saliency[:20] = 1
    picture = heat(image, saliency)
    assert picture.shape == (200, 200, 3)
    assert (picture[100] == 0).all()
    assert np.array_equal(picture[0, 0], (0.8 * HEAT).round())


def test_maps_are_read_by_their_names(finished):
    _, directory = finished["segmentation"]
    pictures = read_heat(directory / "explanations.npz")
    assert list(pictures) == [
        "image", "grad_cam/onnxruntime/before", "grad_cam/onnxruntime/after"
    ]  # fmt: skip
    assert {len(each) for each in pictures.values()} == {4}
