import copy

import pytest

from medlite.report.blind_spots import find_blind_spots
from medlite.report.lookup import Lookup
from medlite.report.page import write_report_html
from medlite.report.result import read_result, write_result
from medlite.report.wandb_sink import summary_of
from medlite.types import Measurement

TEACHER = {
    "name": "unet", "key": "toy-unet-1", "sha256": "ab" * 32, "params": 1000, "macs": 2_000_000,
    "weight_bytes": 4000, "scores": {}, "blind_spots": [],
}  # fmt: skip


def sensitivity(who, name, value):
    return Measurement(name=f"{who}/test/sensitivity/{name}", value=value, unit="")


def test_a_class_that_the_teacher_finds_less_often_is_a_blind_spot():
    values = [
        sensitivity("teacher", "rare_one", 0.25), sensitivity("baseline", "rare_one", 0.75),
        sensitivity("teacher", "common", 0.9), sensitivity("baseline", "common", 0.8),
        sensitivity("teacher", "even", 0.50001), sensitivity("baseline", "even", 0.50004),
        sensitivity("teacher", "alone", 0.1),
    ]  # fmt: skip
    (spot,) = find_blind_spots(Lookup(values), ["Rare one", "Common", "Even", "Alone"])
    assert str(spot) == (
        "Blind spot: the teacher finds 0.250 of Rare one, less than the student's baseline "
        "with 0.750"
    )


@pytest.fixture
def taught(finished):
    """A classification run with a teacher that misses the first class."""
    result, directory = copy.deepcopy(finished["classification"])
    key = next(m.name.rpartition("/")[2] for m in result.measurements if "/sensitivity/" in m.name)
    result.teacher = dict(TEACHER)
    result.measurements += [
        sensitivity("teacher", key, 0.125), sensitivity("baseline", key, 0.5),
        Measurement(name="teacher/test/ece", value=0.0321, unit="", spread=(0.01, 0.05)),
    ]  # fmt: skip
    return result, directory


def test_the_page_shows_the_teacher_beside_its_student_and_tells_its_blind_spots(taught, tmp_path):
    result, directory = taught
    write_report_html(result, directory / "examples.npz", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    section = page[page.index("<h2>Teacher</h2>") :].partition("</section>")[0]
    assert "0.0321" in section
    assert "0.0100 to 0.0500" in section
    assert "Blind spot: the teacher finds 0.125 of" in section
    assert "class_weights=balanced" in section


def test_a_run_without_a_teacher_has_no_section_of_it(finished, tmp_path):
    result, directory = finished["segmentation"]
    write_report_html(result, directory / "examples.npz", tmp_path / "report.html")
    assert "<h2>Teacher</h2>" not in (tmp_path / "report.html").read_text()


def test_the_teacher_reads_back_and_goes_to_the_summary(taught, tmp_path):
    result, _ = taught
    assert read_result(write_result(result, tmp_path)).teacher == TEACHER
    assert summary_of(result)["teacher/test/ece"] == 0.0321
