"""The selective scan in standard ONNX, in the form that suits an engine and a shape.

The same two passes over lanes as `medlite.models.layers.scans.lanes`, which holds the
mathematics. Translation leaves one placeholder a scan; `lower_scans` then replaces it, so that
one translated network serves all engines. A scan becomes

- a single `Scan` over the tokens, where one token is work enough for an engine's operators;
- two `Scan` over the steps of lanes that advance side by side, with a log-depth scan between
  them;
- one `Scan` over blocks of such lanes whose few steps are written out, so that the second pass
  takes the decays of the first;
- one such block without a loop, where the scan is short.

What has the size of a state at every step stays inside the loop bodies. Which form, and how many
lanes, `medlite.export.selective_scan_forms` decides.

OpenVINO (2026.4) sets three rules for a body: its inputs carry an element type, what it takes
from outside is passed in as state, and the state is the first operand of its product
(`decay * state` can give wrong numbers where shapes are static).

Letters: B batch, P parameter sets, L tokens, D channels, N states; M blocks of
G lanes of S steps, K = B G.
"""

# ruff: noqa: N803, N806, PLR0917 - the letters and the argument order of the paper

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

from medlite.export.onnx_emitter import Emitter, Size, float_value
from medlite.export.selective_scan_forms import ENGINES, Engine, Form, Loop

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


class _Operands(NamedTuple):
    """What the steps read: the rates, and tiles with the steps as the outermost axis.

    In a loop over blocks, blocks are the outermost axis and then come the steps.
    """

    rates: ir.Value
    delta: ir.Value
    u: ir.Value
    B: ir.Value
    C: ir.Value | None = None
    """None where nothing is read out"""


_Body = Callable[[Emitter, ir.Value, _Operands], tuple[ir.Value | None, ir.Value | None]]
"""Writes a loop's body: from the state and the operands to the next state and the outputs."""


class _Scan:
    """One scan being written; K holds the batch and, faster, the lanes."""

    def __init__(self, emit: Emitter, engine: Engine, x: ir.Value, A: ir.Value) -> None:
        assert x.shape is not None
        assert A.shape is not None
        sets, channels, states = (int(size) for size in A.shape)  # type: ignore[arg-type]
        width = _samples_of_an_image(x.shape[0]) * sets * channels * states
        length = x.shape[2] if isinstance(x.shape[2], int) else None
        self.emit, self.engine = emit, engine
        self.form = Form.choose(engine, length, channels, width)
        self.batch = emit("Shape", x, start=0, end=1)
        self.length: Size = emit("Shape", x, start=2, end=3) if length is None else length
        self.sizes: dict[str, Size] = {"b": -1, "m": self.form.blocks, "g": self.form.lanes}
        self.sizes |= {"s": self._count_steps(), "p": sets, "d": channels, "n": states}

    def outputs(
        self, x: ir.Value, delta: ir.Value, A: ir.Value, B: ir.Value, C: ir.Value, D: ir.Value
    ) -> ir.Value:
        """Write all of it; (B, P, L, D)."""
        layout = self.form.layout
        tiles = _Operands(
            self._rates(A),
            self._cut(delta, "d", layout.channels),
            self._cut(self.emit("Mul", delta, x), "d", layout.channels),
            self._cut(B, "n", layout.inputs),
            self._cut(C, "n", layout.read_out),
        )
        write = {
            Loop.NONE: self._one_block,
            Loop.STEPS: self._over_steps,
            Loop.BLOCKS: self._over_blocks,
        }[self.form.loop]
        return self.emit("Add", self._to_tokens(write(tiles)), self._direct(D, x))

    def _one_block(self, tiles: _Operands) -> ir.Value:
        """The outputs (S, K P D) without a loop."""
        return self._block(self.emit, None, tiles)[1]

    def _over_blocks(self, tiles: _Operands) -> ir.Value:
        """The outputs (M, S, K P D) of blocks one after another."""
        zero = self.emit.expand(0.0, self._shape(self.form.layout.tile, self.batch))
        return self._loop(self._block, zero, tiles)[1]

    def _over_steps(self, tiles: _Operands) -> ir.Value:
        """The outputs (S, K P D) of all lanes side by side, by a loop for each pass."""
        lane_decay = self._decay_of_lanes(self.emit, tiles)
        entering = self.emit("Mul", lane_decay, 0.0)
        if self.form.lanes > 1:
            (local,) = self._loop(self._step, entering, tiles._replace(C=None))
            entering, _ = self._carry(self.emit, lane_decay, local, None)
        return self._loop(self._step, entering, tiles)[1]

    def _loop(self, write: _Body, state: ir.Value, tiles: _Operands) -> Sequence[ir.Value]:
        """A `Scan` over the outermost axis of the tiles: the last state and any outputs."""
        captures = self.engine.bodies_may_capture
        emit = Emitter()
        h = float_value("h", rank=4)
        rates = tiles.rates if captures else float_value("rates", rank=4)
        scanned = [tile for tile in tiles[1:] if tile is not None]
        slices = [float_value(f"slice_{i}", self._slice_rank(i)) for i in range(len(scanned))]
        h_next, outputs = write(emit, h, _Operands(rates, *slices))
        assert h_next is not None
        carried = [] if captures else [rates]
        results = [h_next, *(emit("Identity", value) for value in carried)]
        if outputs is not None:
            results.append(outputs)
        for value in results:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        body = ir.Graph([h, *carried, *slices], results, nodes=emit.nodes, name="body")
        initial = [state] if captures else [state, tiles.rates]
        values = self.emit.several(
            "Scan", *initial, *scanned, count=len(results), body=body,
            num_scan_inputs=len(scanned),
        )  # fmt: skip
        return [values[0], *values[len(initial) :]]

    def _slice_rank(self, index: int) -> int:
        """The axes of what a body sees of delta, u, B or C."""
        layout = self.form.layout
        axes = (layout.channels, layout.channels, layout.inputs, layout.read_out)[index]
        return len(axes.split()) + (self.form.loop is Loop.BLOCKS)

    def _step(
        self, emit: Emitter, h: ir.Value, tiles: _Operands
    ) -> tuple[ir.Value, ir.Value | None]:
        """One step of all lanes: their next state and, where C is given, the outputs (K P D,)."""
        decay = emit("Exp", emit("Mul", tiles.delta, tiles.rates))
        h_next = emit("Add", emit("Mul", h, decay), emit("Mul", tiles.u, tiles.B))
        return h_next, None if tiles.C is None else self._read_out(emit, h_next, tiles.C)

    def _block(
        self, emit: Emitter, entering: ir.Value | None, tiles: _Operands
    ) -> tuple[ir.Value | None, ir.Value]:
        """One block, its steps written out: the state of one lane that leaves it, and the outputs.

        Args:
            emit: what to write to.
            entering: the state of one lane; None is zero.
            tiles: of this block, with C.

        Returns:
            A tile with one lane, None where none entered lanes; and (S, K P D).
        """
        assert tiles.C is not None
        read = (tiles.delta, tiles.u, tiles.B, tiles.C)
        deltas, us, Bs, Cs = (self._split(emit, tile) for tile in read)
        decays = [emit("Exp", emit("Mul", delta, tiles.rates)) for delta in deltas]
        state, leaving = entering, None
        if self.form.lanes > 1:
            local = emit("Mul", us[0], Bs[0])
            for decay, u, B in zip(decays[1:], us[1:], Bs[1:], strict=True):
                local = emit("Add", emit("Mul", local, decay), emit("Mul", u, B))
            lane_decay = self._decay_of_lanes(emit, tiles)
            state, leaving = self._carry(emit, lane_decay, local, entering)
        outputs = []
        for decay, u, B, C in zip(decays, us, Bs, Cs, strict=True):
            value = emit("Mul", u, B)
            state = value if state is None else emit("Add", emit("Mul", state, decay), value)
            outputs.append(emit("Unsqueeze", self._read_out(emit, state, C), [0]))
        leaving = leaving if self.form.lanes > 1 else state
        return leaving, emit("Concat", *outputs, axis=0)

    def _split(self, emit: Emitter, tiles: ir.Value) -> list[ir.Value]:
        steps = self.form.steps
        assert steps is not None
        if steps == 1:
            return [emit("Squeeze", tiles, [0])]
        parts = emit.several("Split", tiles, count=steps, num_outputs=steps, axis=0)
        return [emit("Squeeze", part, [0]) for part in parts]

    @staticmethod
    def _decay_of_lanes(emit: Emitter, tiles: _Operands) -> ir.Value:
        """What remains of a state after all steps of a lane."""
        total = emit("ReduceSum", tiles.delta, [0], keepdims=0)
        return emit("Exp", emit("Mul", total, tiles.rates))

    def _read_out(self, emit: Emitter, h: ir.Value, C: ir.Value) -> ir.Value:
        """The sum over the states of C h, by a product of matrices: far quicker than ReduceSum."""
        if not self.form.lanes_are_last:
            return emit("MatMul", C, h)
        states = self.sizes["n"]
        assert isinstance(states, int)
        rows = emit("Reshape", emit("Mul", h, C), [states, -1])
        return emit("Reshape", emit("MatMul", [[1.0] * states], rows), [-1])

    def _carry(
        self, emit: Emitter, decay: ir.Value, local: ir.Value, entering: ir.Value | None
    ) -> tuple[ir.Value, ir.Value | None]:
        """The states that enter the lanes, in log2(lanes) steps, and the one that leaves the last.

        Hillis and Steele, "Data parallel algorithms", Commun. ACM 29 (1986), 1170-1183.

        Args:
            emit: what to write to.
            decay: a tile, what remains of a state after a lane.
            local: a tile, what leaves a lane that nothing enters.
            entering: a tile with one lane; None where nothing enters, or leaves.
        """
        tile, lanes = self.form.layout.tile, self.form.lanes
        _, _, behind = tile.partition("k")
        inner = [self._joined(behind)] if behind else []
        decay, local = (emit.reshape(value, [-1, lanes, *inner]) for value in (decay, local))

        def pad(value: ir.Value, before: int, after: int) -> ir.Value:
            zeros = [0] * len(inner)
            return emit("Pad", value, [0, before, *zeros, 0, after, *zeros])

        def shift(value: ir.Value, by: int) -> ir.Value:
            return pad(value, by, -by)

        if entering is not None:
            entering = pad(emit.reshape(entering, [-1, 1, *inner]), 0, lanes - 1)
            local = emit("Add", emit("Mul", entering, decay), local)
        by = 1
        while by < lanes:
            local = emit("Add", emit("Mul", shift(local, by), decay), local)
            if 2 * by < lanes:
                decay = emit("Mul", shift(decay, by), decay)
            by *= 2
        of_lanes = shift(local, 1)
        if entering is None:
            return emit.reshape(of_lanes, self._shape(tile)), None
        leaving = emit("Slice", local, [lanes - 1], [lanes], [1])
        of_lanes = emit("Add", of_lanes, entering)
        of_lanes, leaving = (
            emit.reshape(value, self._shape(tile)) for value in (of_lanes, leaving)
        )
        return of_lanes, leaving

    def _direct(self, D: ir.Value, x: ir.Value) -> ir.Value:
        """D x; by a diagonal matrix where rows are too short to be multiplied one by one."""
        channels = self.sizes["d"]
        assert isinstance(channels, int)
        if channels > self.engine.short_rows:
            return self.emit("Mul", self.emit("Unsqueeze", D, [1]), x)
        identity = torch.eye(channels).tolist()
        return self.emit("MatMul", x, self.emit("Mul", self.emit("Unsqueeze", D, [2]), identity))

    def _count_steps(self) -> Size:
        if self.form.steps is not None:
            return self.form.steps
        lanes = self.form.lanes
        return self.emit("Div", self.emit("Add", self.length, [lanes - 1]), [lanes])

    def _cut(self, tokens: ir.Value, features: str, axes: str) -> ir.Value:
        """(B, P, L, D) or (B, P, L, N) -> ([M,] S, *axes), in the order of the axes."""
        source, target = f"b p m g s {features}", _with_steps(axes)
        moved = self.emit.rearrange(self._padded(tokens), source, target, self.sizes)
        blocks = [self.form.blocks] if self.form.loop is Loop.BLOCKS else []
        return self.emit.reshape(moved, [*blocks, self.sizes["s"], *self._shape(axes)])

    def _rates(self, A: ir.Value) -> ir.Value:
        """(P, D, N) -> a tile, of one lane or, where spans should be long, of all of them."""
        axes = self.form.layout.tile.split()
        order = ["pdn".index(axis) for axis in axes if axis != "k"]
        rates = self.emit("Unsqueeze", self.emit("Transpose", A, perm=order), [axes.index("k")])
        if not self.engine.bodies_may_capture:
            return rates
        of_k = self.emit.product(self.batch, self.form.lanes)
        return self.emit.expand(rates, self._shape(self.form.layout.tile, of_k))

    def _to_tokens(self, outputs: ir.Value) -> ir.Value:
        """([M,] S, K P D) -> (B, P, L, D)."""
        emit = self.emit
        source = _with_steps(self.form.layout.channels)
        moved = emit.rearrange(outputs, source, "b p m g s d", self.sizes)
        padded = self._joined("m g s")
        tokens = emit.reshape(moved, [-1, self.sizes["p"], padded, self.sizes["d"]])
        if padded == self.length:
            return tokens
        end = [self.length] if isinstance(self.length, int) else self.length
        return emit("Slice", tokens, [0], end, [2])

    def _padded(self, tokens: ir.Value) -> ir.Value:
        """Zeros fill the last lane: decay 1, input 0, no effect."""
        padded = self._joined("m g s")
        if isinstance(padded, int) and isinstance(self.length, int):
            missing = padded - self.length
            if not missing:
                return tokens
            return self.emit("Pad", tokens, [0, 0, 0, 0, 0, 0, missing, 0])
        missing_steps = self.emit("Sub", padded, self.length)
        before = self.emit.constant([0] * 6)
        pads = self.emit("Concat", before, missing_steps, self.emit.constant([0]), axis=0)
        return self.emit("Pad", tokens, pads)

    def _shape(self, axes: str, of_k: Size = -1) -> list[Size]:
        """The lengths of axes; that of K follows from the others unless it is given."""
        return [(self.sizes | {"k": of_k, "1": 1})[axis] for axis in axes.split()]

    def _joined(self, letters: str) -> Size:
        return self.emit.product(*(self.sizes[letter] for letter in letters.split()))


def _with_steps(axes: str) -> str:
    """The order of all axes of a tile of many steps; K is the batch and, faster, the lanes."""
    return "m s " + axes.replace("k", "b g").replace("1", "")


def _samples_of_an_image(batch: int | ir.SymbolicDim) -> int:
    """4 for "4*batch", as where parts of an image are folded into the batch."""
    if isinstance(batch, int):
        return batch
    factor = re.match(r"(\d+)\*", str(batch.value))
    return int(factor[1]) if factor else 1
