"""The selective scan in standard ONNX, in the form that suits an engine and a shape.

The same two passes over lanes as `medlite.models.layers.scans.lanes`, which holds the
mathematics. Translation leaves one placeholder a scan; `lower_scans` then replaces it, so that
one translated network serves all engines. A scan becomes

- a single `Scan` over the tokens, where one token is work enough for an engine's operators;
- two `Scan` over the steps of lanes that advance side by side, with a log-depth scan between
  them: what has the size of a state at every step stays inside the loop bodies;
- the same without loops, where the scan is short.

OpenVINO (2026.4) sets three rules for a body: its inputs carry an element type, what it takes
from outside is passed in as state, and the state is the first operand of its product
(`decay * state` can give wrong numbers where shapes are static).

Letters: B batch, P parameter sets, L tokens, D channels, N states; S steps of a lane, G lanes,
K = B G.
"""

# ruff: noqa: N803, N806, PLR0917 - the letters and the argument order of the paper

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

from medlite.export.onnx_emitter import Emitter, Size, float_value

DOMAIN = "medlite"
NAME = "SelectiveScan"

_FLOAT = "tensor(float)"
_PLACEHOLDER = Op(
    Opset(DOMAIN, 1),
    NAME,
    OpSchema(
        NAME,
        DOMAIN,
        since_version=1,
        inputs=[OpSchema.FormalParameter(name, _FLOAT) for name in ("x", "delta", *"ABCD")],
        outputs=[OpSchema.FormalParameter("y", _FLOAT)],
    ),
)
"""A scan that is still to be written out."""

TILE_ELEMENTS = 2**16
"""states of all lanes at one step: enough to outweigh a node's overhead, and still in the cache"""

UNROLLED_ELEMENTS, UNROLLED_STEPS = 2**17, 32
"""the largest scan (B L D N) and the most steps that are written without loops"""

DYNAMIC_LANES = 32


@dataclass(frozen=True, kw_only=True)
class _Engine:
    """What was measured to be best on an engine (benchmarks/selective_scan.py)."""

    few_channels: int
    """up to so many, lanes are the innermost axis"""
    few_channels_unrolled: int
    short_rows: int
    """channels up to which a product of matrices is quicker than one that repeats its rows"""
    wide: int
    """states at one token (B P D N) from which lanes bring nothing"""
    bodies_may_capture: bool


ENGINES = {
    "onnxruntime": _Engine(
        few_channels=96,
        few_channels_unrolled=24,
        short_rows=32,
        wide=4096,
        bodies_may_capture=True,
    ),
    "openvino": _Engine(
        few_channels=24,
        few_channels_unrolled=24,
        short_rows=0,
        wide=8192,
        bodies_may_capture=False,
    ),
}


class _Layout(NamedTuple):
    """The order of axes in what the steps read; "1" is an axis of length 1."""

    tile: str
    """the states of all lanes at one step"""
    channels: str
    inputs: str
    """B"""
    read_out: str
    """C"""


LANES_LAST = _Layout(tile="n p d k", channels="p d k", inputs="n p 1 k", read_out="n p 1 k")
CHANNELS_LAST = _Layout(tile="k p n d", channels="k p 1 d", inputs="k p n 1", read_out="k p 1 n")


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as `custom_translation_table`; `lower_scans` follows it."""
    return {torch.ops.medlite.selective_scan.default: _translate}


def _translate(x: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    return _PLACEHOLDER(x, delta, A, B, C, D)


def lower_scans(model: ir.Model, engine: str) -> None:
    """Replace, in place, every placeholder by operators that are quick on `engine`.

    Args:
        model: translated with `translation_table`, not optimised yet.
        engine: "onnxruntime" or "openvino".
    """
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == NAME:
            x, delta, A, B, C, D = (value for value in node.inputs if value is not None)
            emit = Emitter()
            outputs = _Scan(emit, ENGINES[engine], x, A).outputs(x, delta, A, B, C, D)
            old = node.outputs[0]
            outputs.shape, outputs.type = old.shape, old.type
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], emit.nodes, [old], [outputs]
            )
    model.graph.opset_imports.pop(DOMAIN, None)


class _Form(NamedTuple):
    """How the tokens are cut, and whether lanes or channels are innermost."""

    lanes: int
    lanes_are_last: bool
    is_unrolled: bool

    @property
    def layout(self) -> _Layout:
        return LANES_LAST if self.lanes_are_last else CHANNELS_LAST

    @classmethod
    def choose(cls, engine: _Engine, length: int | None, channels: int, width: int) -> _Form:
        """For `width` = B P D N states at one token of one image; L may be None."""
        if length is None:
            return cls(DYNAMIC_LANES, channels < engine.few_channels, is_unrolled=False)
        lanes = 1
        has_few_channels = channels < engine.few_channels
        if width < engine.wide:
            most = math.sqrt(length) * (2 if has_few_channels else 1)
            most = min(TILE_ELEMENTS / width, most, length / 4)
            lanes = 2 ** max(round(math.log2(most)), 0)
        is_short = length * width <= UNROLLED_ELEMENTS and length <= lanes * UNROLLED_STEPS
        if is_short:
            has_few_channels = channels < engine.few_channels_unrolled
        return cls(lanes, has_few_channels, is_unrolled=is_short)


class _Operands(NamedTuple):
    """What the steps read: tiles with the steps as the outermost axis, and the rates."""

    rates: ir.Value
    delta: ir.Value
    u: ir.Value
    B: ir.Value
    C: ir.Value


class _Scan:
    """One scan being written; K holds the batch and, faster, the lanes."""

    def __init__(self, emit: Emitter, engine: _Engine, x: ir.Value, A: ir.Value) -> None:
        assert x.shape is not None
        assert A.shape is not None
        sets, channels, states = (int(size) for size in A.shape)  # type: ignore[arg-type]
        batch = _samples_of_an_image(x.shape[0])
        length = x.shape[2] if isinstance(x.shape[2], int) else None
        self.emit, self.engine = emit, engine
        self.form = _Form.choose(engine, length, channels, batch * sets * channels * states)
        self.length: Size = emit("Shape", x, start=2, end=3) if length is None else length
        self.steps = self._count_steps()
        self.sizes: dict[str, Size] = {"b": -1, "g": self.form.lanes, "s": self.steps}
        self.sizes |= {"p": sets, "d": channels, "n": states}

    def outputs(
        self, x: ir.Value, delta: ir.Value, A: ir.Value, B: ir.Value, C: ir.Value, D: ir.Value
    ) -> ir.Value:
        """Write all of it; (B, P, L, D)."""
        emit = self.emit
        layout = self.form.layout
        delta_tiles = self._cut(delta, "d", layout.channels)
        total = emit("ReduceSum", delta_tiles, [0], keepdims=0)
        rates = self._rates(A)
        lane_decay = emit("Exp", emit("Mul", total, rates))
        zero = emit("Mul", lane_decay, 0.0)
        if self.engine.bodies_may_capture:
            rates = emit("Add", rates, zero)
        tiles = _Operands(
            rates,
            delta_tiles,
            self._cut(emit("Mul", delta, x), "d", layout.channels),
            self._cut(B, "n", layout.inputs),
            self._cut(C, "n", layout.read_out),
        )
        run = self._unrolled if self.form.is_unrolled else self._looped
        entering = zero
        if self.form.lanes > 1:
            entering = self._carry(lane_decay, run(zero, tiles, reads_out=False))
        y = self._to_tokens(run(entering, tiles, reads_out=True))
        return emit("Add", y, self._direct(D, x))

    def _direct(self, D: ir.Value, x: ir.Value) -> ir.Value:
        """D x; by a diagonal matrix where rows are too short to be multiplied one by one."""
        channels = self.sizes["d"]
        assert isinstance(channels, int)
        if channels > self.engine.short_rows:
            return self.emit("Mul", self.emit("Unsqueeze", D, [1]), x)
        identity = torch.eye(channels).tolist()
        return self.emit("MatMul", x, self.emit("Mul", self.emit("Unsqueeze", D, [2]), identity))

    def _count_steps(self) -> Size:
        lanes = self.form.lanes
        if isinstance(self.length, int):
            return -(-self.length // lanes)
        return self.emit("Div", self.emit("Add", self.length, [lanes - 1]), [lanes])

    def _looped(self, state: ir.Value, tiles: _Operands, *, reads_out: bool) -> ir.Value:
        """A `Scan` over the steps: the last state, or the outputs (S, K P D)."""
        captures = self.engine.bodies_may_capture
        emit = Emitter()
        h = float_value("h", rank=4)
        rates = tiles.rates if captures else float_value("rates", rank=4)
        scanned = [tiles.delta, tiles.u, tiles.B] + ([tiles.C] if reads_out else [])
        layout = self.form.layout
        axes = (layout.channels, layout.channels, layout.inputs, layout.read_out)
        slices = [float_value(f"slice_{i}", rank=len(axes[i].split())) for i in range(len(scanned))]
        h_next = self._step(emit, h, rates, *slices[:3])
        carried = [] if captures else [rates]
        results = [h_next, *(emit("Identity", value) for value in carried)]
        if reads_out:
            results.append(self._read_out(emit, h_next, slices[3]))
        for value in results:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        body = ir.Graph([h, *carried, *slices], results, nodes=emit.nodes, name="step")
        initial = [state] if captures else [state, tiles.rates]
        outputs = self.emit.several(
            "Scan", *initial, *scanned, count=len(results), body=body,
            num_scan_inputs=len(scanned),
        )  # fmt: skip
        return outputs[-1] if reads_out else outputs[0]

    def _unrolled(self, state: ir.Value, tiles: _Operands, *, reads_out: bool) -> ir.Value:
        """As `_looped`, every step written out."""
        scanned = (tiles.delta, tiles.u, tiles.B, tiles.C)
        outputs = []
        for delta, u, B, C in zip(*(self._split(tile) for tile in scanned), strict=True):
            state = self._step(self.emit, state, tiles.rates, delta, u, B)
            if reads_out:
                outputs.append(self.emit("Unsqueeze", self._read_out(self.emit, state, C), [0]))
        return self.emit("Concat", *outputs, axis=0) if reads_out else state

    def _split(self, tiles: ir.Value) -> list[ir.Value]:
        assert isinstance(self.steps, int)
        if self.steps == 1:
            parts = [tiles]
        else:
            parts = list(
                self.emit.several("Split", tiles, count=self.steps, num_outputs=self.steps, axis=0)
            )
        return [self.emit("Squeeze", part, [0]) for part in parts]

    @staticmethod
    def _step(
        emit: Emitter, h: ir.Value, rates: ir.Value, delta: ir.Value, u: ir.Value, B: ir.Value
    ) -> ir.Value:
        decay = emit("Exp", emit("Mul", delta, rates))
        return emit("Add", emit("Mul", h, decay), emit("Mul", u, B))

    def _read_out(self, emit: Emitter, h: ir.Value, C: ir.Value) -> ir.Value:
        """The sum over the states of C h, by a product of matrices: far quicker than ReduceSum."""
        if not self.form.lanes_are_last:
            return emit("MatMul", C, h)
        states = self.sizes["n"]
        assert isinstance(states, int)
        rows = emit("Reshape", emit("Mul", h, C), [states, -1])
        return emit("Reshape", emit("MatMul", [[1.0] * states], rows), [-1])

    def _carry(self, decay: ir.Value, local: ir.Value) -> ir.Value:
        """The state that enters each lane, in log2(lanes) steps.

        Hillis and Steele, "Data parallel algorithms", Commun. ACM 29 (1986), 1170-1183.
        """
        emit, lanes = self.emit, self.form.lanes
        _, _, behind = self.form.layout.tile.partition("k")
        inner = [self._joined(behind)] if behind else []
        decay, local = (emit.reshape(tile, [-1, lanes, *inner]) for tile in (decay, local))

        def shift(tile: ir.Value, by: int) -> ir.Value:
            zeros = [0] * len(inner)
            return emit("Pad", tile, [0, by, *zeros, 0, -by, *zeros])

        by = 1
        while by < lanes:
            local = emit("Add", local, emit("Mul", decay, shift(local, by)))
            if 2 * by < lanes:
                decay = emit("Mul", decay, shift(decay, by))
            by *= 2
        return emit.reshape(shift(local, 1), self._shape(self.form.layout.tile))

    def _cut(self, tokens: ir.Value, features: str, axes: str) -> ir.Value:
        """(B, P, L, D) or (B, P, L, N) -> (S, *axes), in the order of the axes."""
        order = "s " + axes.replace("k", "b g").replace("1", "")
        moved = self.emit.rearrange(self._padded(tokens), f"b p g s {features}", order, self.sizes)
        return self.emit.reshape(moved, [self.steps, *self._shape(axes)])

    def _rates(self, A: ir.Value) -> ir.Value:
        """(P, D, N) -> a tile with one lane."""
        axes = self.form.layout.tile.split()
        order = ["pdn".index(axis) for axis in axes if axis != "k"]
        return self.emit("Unsqueeze", self.emit("Transpose", A, perm=order), [axes.index("k")])

    def _to_tokens(self, outputs: ir.Value) -> ir.Value:
        """S tiles without states -> (B, P, L, D)."""
        emit = self.emit
        order = "s " + self.form.layout.channels.replace("k", "b g").replace("1", "")
        moved = emit.rearrange(outputs, order, "b p g s d", self.sizes)
        padded = self._joined("g s")
        tokens = emit.reshape(moved, [-1, self.sizes["p"], padded, self.sizes["d"]])
        if padded == self.length:
            return tokens
        end = [self.length] if isinstance(self.length, int) else self.length
        return emit("Slice", tokens, [0], end, [2])

    def _padded(self, tokens: ir.Value) -> ir.Value:
        """Zeros fill the last lane: decay 1, input 0, no effect."""
        padded = self._joined("g s")
        if isinstance(padded, int) and isinstance(self.length, int):
            missing = padded - self.length
            if not missing:
                return tokens
            return self.emit("Pad", tokens, [0, 0, 0, 0, 0, 0, missing, 0])
        missing_steps = self.emit("Sub", padded, self.length)
        before = self.emit.constant([0] * 6)
        pads = self.emit("Concat", before, missing_steps, self.emit.constant([0]), axis=0)
        return self.emit("Pad", tokens, pads)

    def _shape(self, axes: str) -> list[Size]:
        """The lengths of axes; that of K follows from the others."""
        return [(self.sizes | {"k": -1, "1": 1})[axis] for axis in axes.split()]

    def _joined(self, letters: str) -> Size:
        return self.emit.product(*(self.sizes[letter] for letter in letters.split()))


def _samples_of_an_image(batch: int | ir.SymbolicDim) -> int:
    """4 for "4*batch", as where parts of an image are folded into the batch."""
    if isinstance(batch, int):
        return batch
    factor = re.match(r"(\d+)\*", str(batch.value))
    return int(factor[1]) if factor else 1
