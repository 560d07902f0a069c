# ruff: noqa: N803, N806, PLR0917, ANN202 - the paper's letters; onnxscript infers what a body gives
# mypy: disable-error-code="no-untyped-def"
"""The selective scan in standard ONNX: three `Scan` operators, for any batch size.

The same two passes over lanes as `medlite.models.layers.selective_scan`, which holds the
mathematics; what has the size of a state at every step stays inside the loop bodies.
OpenVINO (2026.4) sets three rules for a body: its inputs carry an element type, what it takes
from outside is passed in as state unless constant, and the state is the first operand of its
product (`decay * state` can give wrong numbers where shapes are static).

Letters: B batch, L tokens, D channels, N states; S steps of a lane, G lanes, K = G B.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from onnxscript import FLOAT, INT64, graph, opset18, script

op: Any = opset18
if TYPE_CHECKING:
    Float: TypeAlias = Any
    Integers: TypeAlias = Any
else:
    Float, Integers = FLOAT[...], INT64[...]

FEW_CHANNELS = 24
"""With fewer channels than this, both runtimes are faster when the lanes are innermost."""


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as `custom_translation_table`."""
    return {torch.ops.medlite.selective_scan.default: _translate}


def _translate(x: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    """The operator's operands as ONNX values -> (B, L, D)."""
    length, channels, states = x.shape[1], x.shape[2], A.shape[1]
    layout = _Layout.choose(length, channels)
    rates = op.Reshape(op.Transpose(A, perm=[1, 0]), layout.tile(states, channels, 1))
    delta_lanes = layout.cut(delta, 1, channels)
    u_lanes = layout.cut(op.Mul(delta, x), 1, channels)
    B_lanes, C_lanes = layout.cut(B, states, 1), layout.cut(C, states, 1)
    lane_decay = op.Exp(op.Mul(op.ReduceSum(delta_lanes, [0], keepdims=0), rates))
    zero = op.Mul(lane_decay, 0.0)
    local = _advance(zero, rates, delta_lanes, u_lanes, B_lanes)
    entering = layout.carry(zero, lane_decay, local, states, channels)
    operands = rates, delta_lanes, u_lanes, B_lanes, C_lanes
    y = _read_out(entering, *operands, [layout.state_axis])
    return op.Add(layout.join(y, channels), op.Mul(D, x))


class _Layout(NamedTuple):
    """Where the lanes stand in a tile: first (K, N, D), or last (N, D, K)."""

    length: int
    steps: int
    lanes: int
    lanes_are_last: bool

    @classmethod
    def choose(cls, length: int, channels: int) -> "_Layout":
        steps = 2 ** round(math.log2(length) / 2)
        return cls(length, steps, -(-length // steps), channels < FEW_CHANNELS)

    @property
    def lane_axis(self) -> int:
        return 2 if self.lanes_are_last else 0

    @property
    def state_axis(self) -> int:
        return 0 if self.lanes_are_last else 1

    def tile(self, n: int, d: int, *k: int) -> list[int]:
        return [n, d, *k] if self.lanes_are_last else [*k, n, d]

    def cut(self, tokens: Any, n: int, d: int) -> Any:
        """(B, L, n d) -> S tiles; zeros fill the last lane: decay 1, input 0, no effect."""
        missing = self.steps * self.lanes - self.length
        if missing:
            tokens = op.Pad(tokens, [0, 0, 0, 0, missing, 0])
        split = op.Reshape(tokens, [-1, self.lanes, self.steps, n, d])
        order = [2, 3, 4, 1, 0] if self.lanes_are_last else [2, 1, 0, 3, 4]
        return op.Reshape(op.Transpose(split, perm=order), [self.steps, *self.tile(n, d, -1)])

    def carry(self, zero: Any, lane_decay: Any, local: Any, n: int, d: int) -> Any:
        """The state that enters each lane."""
        axis = self.lane_axis
        by_lane = self.tile(n, d, self.lanes, -1)
        zero_of_lane = op.Gather(op.Reshape(zero, by_lane), 0, axis=axis)
        operands = zero_of_lane, op.Reshape(lane_decay, by_lane), op.Reshape(local, by_lane)
        entering = _carry(*operands, axes_in=[axis, axis], axes_out=[axis])
        return op.Reshape(entering, self.tile(n, d, -1))

    def join(self, y: Any, d: int) -> Any:
        """S tiles without states -> (B, L, D)."""
        by_lane = [d, self.lanes, -1] if self.lanes_are_last else [self.lanes, -1, d]
        order = [3, 2, 0, 1] if self.lanes_are_last else [2, 1, 0, 3]
        split = op.Transpose(op.Reshape(y, [self.steps, *by_lane]), perm=order)
        tokens = op.Reshape(split, [-1, self.lanes * self.steps, d])
        return op.Slice(tokens, [0], [self.length], [1])


@script()
def _advance(zero: Float, rates: Float, delta: Float, u: Float, B: Float) -> Float:
    """The last state of every lane that starts from zero."""

    @graph()
    def step(h: Float, rates_s: Float, delta_s: Float, u_s: Float, B_s: Float):
        h_next = h * op.Exp(delta_s * rates_s) + u_s * B_s
        rates_next = op.Identity(rates_s)
        return h_next, rates_next

    local, _ = op.Scan(zero, rates, delta, u, B, body=step, num_scan_inputs=3)
    return local


@script()
def _carry(
    zero: Float, lane_decay: Float, local: Float, axes_in: Sequence[int], axes_out: Sequence[int]
) -> Float:
    """What the lanes before it leave to each lane."""

    @graph()
    def step(h: Float, lane_decay_g: Float, local_g: Float):
        h_next = h * lane_decay_g + local_g
        entering_g = op.Identity(h)
        return h_next, entering_g

    _, entering = op.Scan(
        zero,
        lane_decay,
        local,
        body=step,
        num_scan_inputs=2,
        scan_input_axes=axes_in,
        scan_output_axes=axes_out,
    )
    return entering


@script()
def _read_out(
    entering: Float, rates: Float, delta: Float, u: Float, B: Float, C: Float, axis: Integers
) -> Float:
    """The outputs of all steps, states summed along `axis`."""

    @graph()
    def step(h: Float, rates_s: Float, delta_s: Float, u_s: Float, B_s: Float, C_s: Float):
        h_next = h * op.Exp(delta_s * rates_s) + u_s * B_s
        rates_next = op.Identity(rates_s)
        y = op.ReduceSum(h_next * C_s, axis, keepdims=0)
        return h_next, rates_next, y

    _, _, outputs = op.Scan(entering, rates, delta, u, B, C, body=step, num_scan_inputs=4)
    return outputs
