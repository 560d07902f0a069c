"""The wavefront scan in standard ONNX: one `Scan` over the diagonals, for any batch size.

The steps of `medlite.models.layers.scans.wavefront`, which holds the mathematics; what has the
size of a state at every step stays inside the loop's body. OpenVINO (2026.4) sets three rules
for a body: its inputs carry an element type, what it takes from outside is passed in as state,
and the state is the first operand of its product (`decay * state` can give wrong numbers where
shapes are static).

Letters: B batch, H W height and width, D channels, N states; S = H + W - 1 diagonals.
"""

# ruff: noqa: N803, PLR0917, ANN202 - the paper's letters; onnxscript infers what a body gives
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import FLOAT, graph, opset18, script

op: Any = opset18
if TYPE_CHECKING:
    Float: TypeAlias = Any
else:
    Float = FLOAT[...]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as `custom_translation_table`."""
    return {torch.ops.medlite.wavefront_scan.default: _translate}


def _translate(x: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    """The operator's operands as ONNX values -> (B, H, W, D)."""
    height, width, channels = x.shape[1:]
    states = A.shape[2]
    weights = _edge_weights(height, width)
    u = op.Mul(op.Mul(delta, op.Unsqueeze(x, [1])), _constant(weights[..., None]))
    left, top = (
        _skew(op.Gather(delta, source, axis=1), height, width, 1, channels) for source in (0, 1)
    )
    rates_left, rates_top = (op.Transpose(op.Gather(A, source, axis=0)) for source in (0, 1))
    tile = op.Constant(value_ints=[height, states, channels])
    size = op.Concat(op.Shape(x, start=0, end=1), tile, axis=0)
    y = _advance(
        op.Expand(op.Constant(value_float=0.0), size),
        rates_left,
        rates_top,
        left,
        top,
        _skew(op.Transpose(u, perm=[0, 2, 3, 1, 4]), height, width, 2, channels),
        _skew(op.Transpose(B, perm=[0, 2, 3, 4, 1]), height, width, states, 2),
        _skew(C, height, width, 1, states),
        _constant(_diagonals(weights.max(0))[..., None, None]),
    )
    return op.Add(_unskew(y, height, width, channels), op.Mul(D, x))


@script()
def _advance(
    zero: Float,
    rates_left: Float,
    rates_top: Float,
    left: Float,
    top: Float,
    u: Float,
    B: Float,
    C: Float,
    share: Float,
) -> Float:
    """The outputs of all diagonals, (S, B, H, 1, D)."""

    @graph()
    def step(
        h: Float,
        rates_left_s: Float,
        rates_top_s: Float,
        left_s: Float,
        top_s: Float,
        u_s: Float,
        B_s: Float,
        C_s: Float,
        share_s: Float,
    ):
        above = op.Pad(h, [0, 1, 0, 0, 0, -1, 0, 0])
        kept = h * op.Exp(left_s * rates_left_s) + above * op.Exp(top_s * rates_top_s)
        h_next = kept * share_s + op.MatMul(B_s, u_s)
        rates_left_next = op.Identity(rates_left_s)
        rates_top_next = op.Identity(rates_top_s)
        y = op.MatMul(C_s, h_next)
        return h_next, rates_left_next, rates_top_next, y

    _, _, _, outputs = op.Scan(
        zero, rates_left, rates_top, left, top, u, B, C, share, body=step, num_scan_inputs=6
    )
    return outputs


def _edge_weights(height: int, width: int) -> np.ndarray:
    """(2, H, W) how much the left and the upper neighbour count; their sum is 1."""
    rows, columns = np.indices((height, width))
    top = np.where(rows == 0, 0.0, np.where(columns == 0, 1.0, 0.5))
    return np.stack([1 - top, top])


def _diagonals(weights: np.ndarray) -> np.ndarray:
    """(H, W) -> (S, H), row i moved i columns to the right."""
    height, width = weights.shape
    skewed = np.zeros((height + width - 1, height))
    for row, values in enumerate(weights):
        skewed[row : row + width, row] = values
    return skewed


def _skew(maps: Any, height: int, width: int, *features: int) -> Any:
    """(B, H, W, ...) -> (S, B, H, *features), row i moved i columns to the right."""
    num_features, steps = math.prod(features), height + width - 1
    rows = op.Reshape(maps, [-1, height, width, num_features])
    padded = op.Pad(rows, [0, 0, 0, 0, 0, 0, height, 0])
    flat = op.Reshape(padded, [-1, height * (width + height), num_features])
    skewed = op.Reshape(op.Slice(flat, [0], [height * steps], [1]), [-1, height, steps, *features])
    return op.Transpose(skewed, perm=[2, 0, 1, *range(3, 3 + len(features))])


def _unskew(diagonals: Any, height: int, width: int, channels: int) -> Any:
    """(S, B, H, 1, D) -> (B, H, W, D)."""
    steps = height + width - 1
    rows = op.Transpose(op.Squeeze(diagonals, [3]), perm=[1, 2, 0, 3])
    flat = op.Reshape(rows, [-1, height * steps, channels])
    padded = op.Pad(flat, [0, 0, 0, 0, height, 0])
    maps = op.Reshape(padded, [-1, height, width + height, channels])
    return op.Slice(maps, [0], [width], [2])


def _constant(values: np.ndarray) -> Any:
    return op.Constant(value=ir.tensor(values.astype(np.float32)))
