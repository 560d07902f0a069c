"""What counts as the same answer from two runtimes."""

import math

import numpy as np
import pytest

from medlite.errors import ExportError
from medlite.export.parity import TOLERANCES, check_parity

GENERATOR = np.random.default_rng(0)


def compare(ours, theirs, **options):
    return check_parity(ours, theirs, **{"labels": "multiclass", "precision": "fp32", **options})


def test_identical_logits_pass_with_nothing_different():
    logits = GENERATOR.normal(size=(6, 3))
    parity = compare(logits, logits)
    assert parity.passed
    assert (parity.max_abs_difference, parity.num_flips, parity.dice) == (0.0, 0, None)
    assert parity.cosine == pytest.approx(1.0)


def test_differences_are_those_of_the_definitions():
    ours = np.array([[3.0, 0.0], [0.0, 4.0]])
    theirs = np.array([[3.0, 0.0], [0.0, 3.0]])
    parity = compare(ours, theirs)
    assert parity.max_abs_difference == 1.0
    assert parity.max_relative_difference == pytest.approx(1 / 4)
    assert parity.cosine == pytest.approx((9 + 12) / (5 * math.sqrt(18)))


def test_float_graph_fails_on_its_logits_though_no_decision_flips():
    ours = GENERATOR.normal(size=(6, 3))
    parity = compare(ours, ours * 1.01)
    assert parity.num_flips == 0
    assert not parity.passed
    assert "logits differ by 0.01 of the largest" in parity.reasons[0]


def test_integer_graph_may_move_its_logits_but_not_its_decisions():
    ours = GENERATOR.normal(size=(50, 2))
    assert compare(ours, ours * 1.1, precision="int8").passed
    flipped = ours.copy()
    flipped[:2] = flipped[:2, ::-1]
    parity = compare(ours, flipped, precision="int8")
    assert (parity.num_flips, parity.num_decisions) == (2, 50)
    assert "2 of 50 decisions flip (4.00%)" in parity.reasons[0]


@pytest.mark.parametrize("labels", ["binary", "multiclass"])
def test_flips_and_dice_of_masks_match_a_loop_over_pixels(labels):
    num_logits = 1 if labels == "binary" else 3
    ours = GENERATOR.normal(size=(2, num_logits, 5, 4))
    theirs = ours + GENERATOR.normal(size=ours.shape) * 0.5

    def decide(logits):
        return int(logits[0] > 0) if labels == "binary" else int(np.argmax(logits))

    pairs = [
        (decide(ours[n, :, i, j]), decide(theirs[n, :, i, j]))
        for n in range(2)
        for i in range(5)
        for j in range(4)
    ]
    agreeing = sum(a == b and a > 0 for a, b in pairs)
    foreground = sum(a > 0 for a, _ in pairs) + sum(b > 0 for _, b in pairs)
    parity = compare(ours, theirs, labels=labels)
    assert parity.num_flips == sum(a != b for a, b in pairs) > 0
    assert parity.dice == pytest.approx(2 * agreeing / foreground)


def test_two_empty_masks_agree():
    empty = np.full((1, 1, 4, 4), -1.0)
    assert compare(empty, empty, labels="binary").dice == 1.0


def test_lost_small_lesion_fails_although_few_pixels_flip():
    ours = np.full((1, 1, 64, 64), -1.0)
    ours[0, 0, :4, :4] = 1.0
    parity = compare(ours, np.full_like(ours, -1.0), labels="binary", precision="int8")
    assert parity.flip_ratio < 0.02
    assert not parity.passed
    assert "Dice 0.0000" in parity.reasons[0]


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_logits_that_are_not_finite_never_pass(value, precision):
    """No decision flips: neither value is above 0, and neither are torch's logits."""
    ours = np.full((4, 1), -1.0)
    theirs = ours.copy()
    theirs[0, 0] = value
    parity = compare(ours, theirs, labels="binary", precision=precision)
    assert parity.num_flips == 0
    assert not parity.passed
    (reason,) = parity.reasons
    assert reason.startswith("1 of 4 logits of the runtime are NaN or infinite")
    assert parity.max_relative_difference == math.inf


def test_a_difference_from_logits_of_torch_that_are_not_finite_is_infinite():
    parity = compare(np.full((4, 2), np.inf), np.ones((4, 2)))
    assert (parity.passed, parity.max_relative_difference) == (False, math.inf)


def test_metric_difference_is_the_runtimes_less_torchs():
    ours, theirs = np.ones((2, 2)), np.full((2, 2), 3.0)
    parity = compare(ours, theirs, metric=lambda logits: float(logits.mean()))
    assert parity.metric_difference == 2.0


def test_other_shapes_are_refused():
    with pytest.raises(ExportError, match="not of the same images or network"):
        compare(np.ones((2, 2)), np.ones((3, 2)))
