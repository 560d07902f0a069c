"""How a scan is cut, without an engine."""

import pytest

from medlite.export.selective_scan_forms import BLOCK_STEPS, ENGINES, Form, Loop

SHAPES = [(1, 16), (4, 32), (49, 3072), (77, 1024), (600, 1024), (3136, 12288), (65536, 256)]
"""tokens, and states at one of them"""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("length", "width"), SHAPES)
@pytest.mark.parametrize("channels", [8, 64])
def test_a_form_holds_all_tokens_and_at_most_one_block_too_many(engine, length, width, channels):
    form = Form.choose(ENGINES[engine], length, channels, width)
    block = form.lanes * form.steps
    assert length <= form.blocks * block < length + block


@pytest.mark.parametrize(("length", "width"), SHAPES)
def test_blocks_are_short_and_little_is_filled_up(length, width):
    form = Form.choose(ENGINES["openvino"], length, 64, width)
    assert form.steps <= BLOCK_STEPS
    assert form.blocks * form.lanes * form.steps <= 1.2 * length + 3


def test_wide_tokens_need_no_lanes():
    for engine in ENGINES.values():
        assert Form.choose(engine, 3136, 192, 4 * 192 * 16).lanes == 1


def test_an_unknown_length_is_looped_over_step_by_step():
    for engine in ENGINES.values():
        form = Form.choose(engine, None, 64, 1024)
        assert form.loop is Loop.STEPS
        assert form.steps is None
