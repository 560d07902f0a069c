"""How a selective scan is cut into blocks, lanes and steps, by engine and by shape.

All forms compute the two passes over lanes that `medlite.models.layers.scans.lanes` describes;
they differ in what is looped over and in what is kept. The numbers here were measured with
benchmarks/selective_scan.py.

Letters: B batch, P parameter sets, L tokens, D channels, N states; M blocks of G lanes of S steps,
K = B G.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

UNROLLED_ELEMENTS, UNROLLED_STEPS = 2**17, 32
"""the largest scan (B L D N) and the most steps that ONNX Runtime gets without loops"""

BLOCK_STEPS = 16
"""steps of a block: its decays are kept, and its body is written out"""

DYNAMIC_LANES = 32


class Loop(Enum):
    """What the `Scan` nodes of a form go over."""

    NONE = auto()
    """one block, written out"""
    STEPS = auto()
    """one block; a loop over its steps for each of the two passes, each computing the decays"""
    BLOCKS = auto()
    """blocks one after another, each written out: every decay is computed once"""


class Layout(NamedTuple):
    """The order of axes in what the steps read; "1" is an axis of length 1."""

    tile: str
    """the states of all lanes at one step"""
    channels: str
    inputs: str
    """B"""
    read_out: str
    """C"""


LANES_LAST = Layout(tile="n p d k", channels="p d k", inputs="n p 1 k", read_out="n p 1 k")
CHANNELS_LAST = Layout(tile="k p n d", channels="k p 1 d", inputs="k p n 1", read_out="k p 1 n")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What was measured to be best on an engine."""

    few_channels: int
    """up to so many, lanes are the innermost axis"""
    few_channels_unrolled: int
    short_rows: int
    """channels up to which a product of matrices is quicker than one that repeats its rows"""
    wide: int
    """states at one token (B P D N) from which lanes bring nothing"""
    tile: int
    """states of all lanes at one step: enough to outweigh a node's overhead, and in the cache"""
    loops_over_blocks: bool
    """whether written-out blocks beat loops over steps: where neighbouring operators are fused"""
    bodies_may_capture: bool


ENGINES = {
    "onnxruntime": Engine(
        few_channels=96,
        few_channels_unrolled=24,
        short_rows=32,
        wide=4096,
        tile=2**16,
        loops_over_blocks=False,
        bodies_may_capture=True,
    ),
    "openvino": Engine(
        few_channels=24,
        few_channels_unrolled=24,
        short_rows=0,
        wide=8192,
        tile=2**14,
        loops_over_blocks=True,
        bodies_may_capture=False,
    ),
}


class Form(NamedTuple):
    """How the tokens are cut: blocks, in each of them lanes, in each of them steps."""

    loop: Loop
    blocks: int
    lanes: int
    steps: int | None
    """None where they follow from a length that is not known"""
    lanes_are_last: bool

    @property
    def layout(self) -> Layout:
        """The order of axes."""
        return LANES_LAST if self.lanes_are_last else CHANNELS_LAST

    @classmethod
    def choose(cls, engine: Engine, length: int | None, channels: int, width: int) -> Form:
        """For `width` = B P D N states at one token of one image; L may be None."""
        has_few_channels = channels < engine.few_channels
        if length is None:
            return cls(Loop.STEPS, 1, DYNAMIC_LANES, None, has_few_channels)
        lanes = _count_lanes(engine, length, width, has_few_channels=has_few_channels)
        if engine.loops_over_blocks:
            blocks, steps = _cut_into_blocks(length, lanes)
            loop = Loop.NONE if blocks == 1 else Loop.BLOCKS
            return cls(loop, blocks, lanes, steps, has_few_channels)
        steps = math.ceil(length / lanes)
        if length * width <= UNROLLED_ELEMENTS and steps <= UNROLLED_STEPS:
            return cls(Loop.NONE, 1, lanes, steps, channels < engine.few_channels_unrolled)
        return cls(Loop.STEPS, 1, lanes, steps, has_few_channels)


def _count_lanes(engine: Engine, length: int, width: int, *, has_few_channels: bool) -> int:
    if width >= engine.wide:
        return 1
    most = math.sqrt(length) * (2 if has_few_channels else 1)
    most = min(engine.tile / width, most, length / 4)
    return 2 ** max(round(math.log2(most)), 0)


def _cut_into_blocks(length: int, lanes: int) -> tuple[int, int]:
    """The blocks, and the steps of a lane in one: as many as allowed, with little to fill up."""
    if length <= lanes * BLOCK_STEPS:
        return 1, math.ceil(length / lanes)

    def padded(steps: int) -> int:
        return math.ceil(length / (lanes * steps)) * lanes * steps

    steps = min(range(BLOCK_STEPS, BLOCK_STEPS // 2, -1), key=padded)
    return math.ceil(length / (lanes * steps)), steps
