import re
from html.parser import HTMLParser

import numpy as np
import pytest

from medlite.errors import RecordError
from medlite.report.card import build_card, write_card_markdown
from medlite.report.examples import choose_examples, overlay, read_examples, write_examples
from medlite.report.figures import latency_chart, reliability_chart, training_charts
from medlite.report.lookup import Lookup, number
from medlite.report.page import write_report_html
from medlite.report.svg import nice_ticks
from medlite.report.tables import class_intervals_table, safety_table
from medlite.report.verdict import summarise_verdict
from medlite.types import Measurement, Predictions

CATEGORIES = [
    "Task",
    "Hardware platform",
    "Software stack",
    "Numerical precision",
    "Inference protocol",
    "Latency",
    "Memory",
    "Energy and power",
    "Reliability and safety",
]


class Reader(HTMLParser):
    """Tags, resources and text; an unclosed tag is left on the stack."""

    VOID = ("meta", "img", "br", "line", "rect", "circle", "polyline", "path")

    def __init__(self):
        super().__init__()
        self.open, self.resources, self.tags, self.words = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.resources += [value for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read_page(path):
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_report_is_one_file_without_scripts_or_network(finished, tmp_path, task):
    result, directory = finished[task]
    write_report_html(result, directory / "examples.npz", tmp_path / "report.html")
    reader = read_page(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert reader.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert all(resource.startswith("data:image/png;base64,") for resource in reader.resources)
    assert len(reader.resources) >= 6
    assert not re.search(r"https?://|@import|url\(", text)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_report_shows_every_part_of_the_result(finished, tmp_path, task):
    result, directory = finished[task]
    write_report_html(result, directory / "examples.npz", tmp_path / "report.html")
    words = " ".join(read_page(tmp_path / "report.html").words)
    assert result.verdict["summary"] in words
    for heading in (
        "Results at a glance", "Example predictions", "Classes", "Latency", "Calibration",
        "Safety", "Budgets", "Deployment card", "Training", "Parity", "Lineage", "Environment",
    ):  # fmt: skip
        assert heading in words
    for name in (*result.dataset["class_names"], *CATEGORIES, "INT8 in 31 of 44"):
        assert name in words
    assert "nan" not in words.split()


def test_losses_without_a_margin_stand_in_the_table_as_shown(finished):
    report = finished["classification"][0].safety["onnxruntime"]
    rows = [row for row in safety_table(report).split("<tr>") if "specificity" in row]
    assert len(rows) == 2 * 5  # of decisions, and at operating points
    assert all('<span class="chip quiet">shown</span>' in row for row in rows)
    areas = [row for row in safety_table(report).split("<tr>") if "auc drop/" in row]
    assert len([row for row in areas if "DeLong p = " in row]) == 5


def test_the_intervals_of_each_class_stand_below_the_gate(finished):
    report = finished["classification"][0].safety["onnxruntime"]
    table = class_intervals_table(report)
    assert table.count("<tr>") == 6
    row = report["class_intervals"][4]
    assert f"{row['compressed_exact'][1]:.3g}" in table
    assert class_intervals_table(finished["segmentation"][0].safety["openvino"]) == ""


def test_a_report_of_an_older_record_has_its_judged_rows_alone(finished):
    report = finished["classification"][0].safety["onnxruntime"]
    older = {k: v for k, v in report.items() if k not in ("shown", "class_intervals")}
    assert safety_table(older).count("<tr>") == 1 + len(report["items"])
    assert class_intervals_table(older) == ""


def test_simulated_data_are_named_at_the_top(finished, tmp_path):
    result, directory = finished["segmentation"]
    write_report_html(result, directory / "examples.npz", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.index("semi-synthetic") < text.index("Results at a glance")


def test_words_of_the_user_cannot_become_markup(run, tmp_path):
    result, directory = run
    result.name = "<script>alert(1)</script>"
    result.notes["topic"] = "<b>bold"
    result.card = build_card(result)
    write_report_html(result, directory / "examples.npz", tmp_path / "report.html")
    assert "script" not in read_page(tmp_path / "report.html").tags
    assert "<b>bold" not in (tmp_path / "report.html").read_text()


def test_a_run_without_baseline_examples_or_runtimes_still_has_a_report(run, tmp_path):
    result, _ = run
    result.measurements = [m for m in result.measurements if m.name.startswith("complexity/")]
    result.safety, result.reliability, result.latency_samples_ms = {}, {}, {}
    result.engines, result.parity, result.artifacts, result.history = {}, [], [], {}
    result.notes, result.stability = {}, {}
    result.verdict = {
        "budgets": [],
        "safety": "not compared",
        "parity": "PASS",
        "summary": summarise_verdict(budgets=[], safety="not compared", parity="PASS"),
    }
    result.card = build_card(result)
    write_report_html(result, None, tmp_path / "report.html")
    assert "no compressed model to compare" in (tmp_path / "report.html").read_text()
    assert_card_is_filled(result.card)


def assert_card_is_filled(card):
    assert [category.title for category in card] == CATEGORIES
    for category in card:
        assert category.fields
        for row in category.fields:
            assert row.label
            assert row.value
            assert row.provenance in ("measured", "declared", "estimated", "unavailable")
            assert row.note or row.provenance != "unavailable"


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_every_field_of_the_card_is_filled_with_its_provenance(finished, task):
    result, _ = finished[task]
    assert_card_is_filled(result.card)


def test_an_estimate_is_shown_as_an_estimate(run):
    result, _ = run
    name = "energy/onnxruntime/net_mj_per_image"
    result.measurements = [m for m in result.measurements if m.name != name]
    result.measurements.append(
        Measurement(name=name, value=3.2, unit="mJ", source="estimated", note="TDP model")
    )
    energy = next(c for c in build_card(result) if c.title == "Energy and power")
    field = next(f for f in energy.fields if f.label == "Energy per inference, onnxruntime")
    assert (field.value, field.provenance) == ("3.20 mJ", "estimated")


def test_the_card_names_the_rarest_class_and_what_failed(finished):
    result, _ = finished["classification"]
    fields = {field.label: field for field in result.card[-1].fields}
    assert fields["Rarest class, onnxruntime"].value.startswith("Proliferative: sensitivity 0.567")
    assert "sensitivity_drop/proliferative FAIL" in fields["Safety gate, onnxruntime"].note


def test_the_card_is_written_as_markdown_tables(run, tmp_path):
    result, _ = run
    result.notes["with a | bar"] = "a | b"
    result.card = build_card(result)
    write_card_markdown(result, tmp_path / "card.md")
    text = (tmp_path / "card.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == CATEGORIES
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_examples_read_back_with_their_candidates(tmp_path):
    generator = np.random.default_rng(0)
    images, targets = generator.normal(size=(3, 1, 8, 8)), generator.integers(2, size=(3, 8, 8))
    logits = {"baseline/openvino": generator.normal(size=(3, 1, 8, 8))}
    write_examples(tmp_path / "e.npz", images=images, targets=targets, logits=logits)
    again = read_examples(tmp_path / "e.npz")
    np.testing.assert_allclose(again.images, images, rtol=1e-6)
    np.testing.assert_array_equal(again.targets, targets)
    assert again.logits.keys() == {"baseline/openvino"}


def test_examples_of_volumes_are_the_slices_with_most_annotation(tmp_path):
    images = np.arange(2 * 4 * 4 * 5, dtype=np.float32).reshape(2, 1, 4, 4, 5)
    targets = np.zeros((2, 4, 4, 5), dtype=np.int64)
    targets[0, 1, 1, 3], targets[1, :, :, 0] = 1, 1
    write_examples(tmp_path / "e.npz", images=images, targets=targets, logits={"torch": images + 1})
    again = read_examples(tmp_path / "e.npz")
    np.testing.assert_array_equal(again.images[0, 0], images[0, 0, :, :, 3])
    np.testing.assert_array_equal(again.images[1, 0], images[1, 0, :, :, 0])
    np.testing.assert_array_equal(again.logits["torch"][0, 0], images[0, 0, :, :, 3] + 1)
    assert again.targets.shape == (2, 4, 4)


def test_examples_of_classified_volumes_are_the_middle_slices(tmp_path):
    images = np.arange(4 * 4 * 5, dtype=np.float32).reshape(1, 1, 4, 4, 5)
    write_examples(
        tmp_path / "e.npz", images=images, targets=np.array([1]), logits={"t": np.ones((1, 2))}
    )
    again = read_examples(tmp_path / "e.npz")
    np.testing.assert_array_equal(again.images[0, 0], images[0, 0, :, :, 2])
    assert again.logits["t"].shape == (1, 2)


def test_damaged_examples_are_refused(tmp_path):
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(RecordError, match=r"e\.npz is not a readable examples file"):
        read_examples(tmp_path / "e.npz")


def test_examples_that_cannot_be_written_are_told(tmp_path):
    with pytest.raises(RecordError, match="could not be written: No such file or directory"):
        write_examples(
            tmp_path / "absent" / "e.npz",
            images=np.zeros((1, 1, 2, 2)), targets=np.zeros(1), logits={},
        )  # fmt: skip


def test_examples_are_spread_over_the_whole_split():
    predictions = Predictions(logits=np.zeros((101, 1)), targets=np.zeros(101), groups=())
    assert choose_examples(predictions, 5) == [0, 25, 50, 75, 100]
    few = Predictions(logits=np.zeros((2, 1)), targets=np.zeros(2), groups=())
    assert choose_examples(few) == [0, 1]


def test_an_overlay_colours_only_the_mask_and_outlines_the_truth():
    image = np.zeros((1, 168, 168), dtype=np.float32)
    mask = np.zeros((168, 168), dtype=np.int64)
    mask[50:60, 50:60] = 1
    truth = np.zeros_like(mask)
    truth[100:110, 100:110] = 1
    picture = overlay(image, mask, truth)
    assert picture.shape == (168, 168, 3)
    assert picture[55, 55].tolist() == [128, 79, 14]
    assert picture[100, 100].tolist() == [255, 255, 255]
    assert picture[105, 105].tolist() == [0, 0, 0]


def test_charts_draw_every_candidate_and_skip_what_is_missing():
    assert latency_chart({}) == ""
    chart = latency_chart({"baseline/openvino": [5.0] * 50, "openvino": [2.0] * 50})
    assert "baseline/openvino" in chart
    assert chart.count("<circle") == 100
    rows = [{"epoch": 0, "loss": 1.0, "val/dice": None}, {"epoch": 1, "loss": 0.5}]
    assert len(training_charts(rows, "dice")) == 1
    empty = {"lower": 0.0, "upper": 0.5, "confidence": None, "accuracy": None, "count": 0}
    full = {"lower": 0.5, "upper": 1.0, "confidence": 0.8, "accuracy": 0.7, "count": 9}
    assert reliability_chart("r", {"model": [empty, full]}).count("<circle") == 1


def test_ticks_are_round_and_inside_the_range():
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(0.13, 0.87) == [0.2, 0.4, 0.6, 0.8]
    assert nice_ticks(-5, 120) == [0, 50, 100]


def test_numbers_read_well():
    values = (0.93651, 0.56, 12.345, 49457.3, 20.0, 0.00012)
    shown = ["0.937", "0.560", "12.3", "49,457", "20", "0.000120"]
    assert [number(value) for value in values] == shown


def test_a_score_is_that_of_the_runtimes_own_output_where_there_is_one():
    rows = [
        Measurement(name=name, value=value, unit="")
        for name, value in {
            "test/dice": 0.9,
            "test/openvino/dice": 0.8,
            "baseline/test/dice": 0.95,
        }.items()
    ]
    found = Lookup(rows)
    assert found.score("dice", "openvino").value == 0.8
    assert found.score("dice", "onnxruntime").value == 0.9
    assert found.score("dice", "baseline/openvino").value == 0.95
    assert found.score("auc", "openvino") is None


def test_the_verdict_is_one_sentence():
    budget = {
        "name": "max_size_mib", "runtime": "openvino", "limit": 1.0, "value": 2.5, "unit": "MiB",
        "margin": "",
    }  # fmt: skip
    missed, fits = {**budget, "verdict": "missed"}, {**budget, "verdict": "fits"}
    unknown = {**budget, "verdict": "unknown", "value": None}
    assert summarise_verdict(budgets=[missed, fits], safety="PASS", parity="PASS") == (
        "Misses size_mib on openvino (2.5 of 1 MiB); safety against the uncompressed model: PASS; "
        "parity with torch: PASS."
    )
    assert summarise_verdict(budgets=[fits, unknown], safety="FAIL", parity="PASS").startswith(
        "Meets 1 of 2 budgets, 1 could not be judged; "
    )
    assert summarise_verdict(
        budgets=[fits], safety="not compared", parity="FAIL", quantization="8 operators in 8 bits"
    ) == (
        "Meets all 1 budgets; no compressed model to compare; parity with torch: FAIL; "
        "8 operators in 8 bits."
    )


def test_the_lineage_is_drawn_with_what_each_stage_changed(run, tmp_path):
    result, directory = run
    write_report_html(result, directory / "examples.npz", tmp_path / "report.html")
    words = read_page(tmp_path / "report.html").words
    assert words.count("x0.25 KiB") == 1, "a quarter of the weights is left"
    assert "-0.070" in words, "and a class lost 7 points"
    assert sum(word == "49,457 parameters" for word in words) == 2


def test_a_deployed_model_that_could_not_be_measured_is_never_a_good_verdict(run, tmp_path):
    result, _ = run
    result.verdict |= {
        "budgets": [],
        "safety": "PASS",
        "parity": "PASS",
        "unmeasured": ["openvino"],
    }
    result.failures["openvino"] = "ran out of memory"
    del result.safety["openvino"]
    write_report_html(result, None, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert 'class="verdict bad"' in page
    assert "The deployed model could not be measured: ran out of memory" in page
    fields = {field.label: field for part in build_card(result) for field in part.fields}
    assert fields["Deployed model, openvino"].note == "ran out of memory"
