# ruff: noqa: N803, PLR0917 - the letters and the argument order of the paper
"""The scan of Mamba-2 as ONNX Runtime's own operator, `com.microsoft.LinearAttention`.

With one query head and as many value heads as the scan has, its "gated" rule is the recurrence:
C asks, B is the key, delta x the value, delta A the logarithm of the decay. Its inner loop was
measured to beat the products over chunks that other engines get (benchmarks/selective_scan.py),
and it takes any length. For the scan of Mamba, one head a channel, it is slower than `Scan`.

Letters: B batch, P parameter sets, L tokens, D channels, H heads, N states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import opset18
from onnxscript.values import Op, Opset

from medlite.export.selective_scan_forms import ENGINES

op: Any = opset18


_NAME, _DOMAIN, _FLOAT = "LinearAttention", "com.microsoft", "tensor(float)"
_OPTIONAL = OpSchema.FormalParameterOption.Optional
_LINEAR_ATTENTION = Op(
    Opset(_DOMAIN, 1),
    _NAME,
    OpSchema(
        _NAME,
        _DOMAIN,
        since_version=1,
        inputs=[
            *(OpSchema.FormalParameter(name, _FLOAT) for name in ("query", "key", "value")),
            OpSchema.FormalParameter("past_state", _FLOAT, param_option=_OPTIONAL),
            OpSchema.FormalParameter("decay", _FLOAT, param_option=_OPTIONAL),
        ],
        outputs=[OpSchema.FormalParameter(name, _FLOAT) for name in ("output", "present_state")],
        attributes=[
            OpSchema.Attribute("q_num_heads", OpSchema.AttrType.INT),
            OpSchema.Attribute("kv_num_heads", OpSchema.AttrType.INT),
            OpSchema.Attribute("update_rule", OpSchema.AttrType.STRING),
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT),
        ],
    ),
)


QUICK_HEAD_DIM = 32
"""Channels of a head from which the operator computes whole vectors: a single head that is
smaller is filled up with zeros, which takes less time although it is more work."""


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as `custom_translation_table`."""
    return {torch.ops.medlite.ssd_scan.default: _translate}


def _translate(x: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    """The operator's operands as ONNX values -> (B, P, L, D)."""
    heads, channels, states = A.shape[1], x.shape[3], B.shape[3]
    value = op.Mul(x, op.MatMul(delta, _constant(_head_of_channel(heads, channels))))
    is_short = heads == 1 and channels < QUICK_HEAD_DIM
    if is_short:
        value = op.MatMul(value, _constant(np.eye(channels, QUICK_HEAD_DIM)))
    log_decay = op.Mul(delta, op.Unsqueeze(A, op.Constant(value_ints=[1])))
    outputs, _ = _LINEAR_ATTENTION(
        _rows(C, x, states),
        _rows(B, x, states),
        _rows(value, x, QUICK_HEAD_DIM if is_short else channels),
        None,
        _rows(log_decay, x, heads),
        q_num_heads=1,
        kv_num_heads=heads,
        update_rule="gated",
        scale=1.0,
    )
    if is_short:
        outputs = op.MatMul(outputs, _constant(np.eye(QUICK_HEAD_DIM, channels)))
    return op.Add(op.Reshape(outputs, op.Shape(x)), _direct(D, x, channels))


def _head_of_channel(heads: int, channels: int) -> np.ndarray:
    """(H, D) of zeros and ones: a product with it is quicker than repeating short rows."""
    return np.eye(heads).repeat(channels // heads, axis=1)


def _direct(D: Any, x: Any, channels: int) -> Any:
    """D x; by a diagonal matrix where rows are too short to be multiplied one by one."""
    if channels > ENGINES["onnxruntime"].short_rows:
        return op.Mul(op.Unsqueeze(D, op.Constant(value_ints=[1])), x)
    column = op.Unsqueeze(D, op.Constant(value_ints=[2]))
    return op.MatMul(x, op.Mul(column, _constant(np.eye(channels))))


def _constant(values: np.ndarray) -> Any:
    return op.Constant(value=ir.tensor(values.astype(np.float32)))


def _rows(tokens: Any, x: Any, features: int) -> Any:
    """(B, P, L, ...) -> (B P, L, features)."""
    length = op.Shape(x, start=2, end=3)
    ends = (op.Constant(value_ints=[size]) for size in (-1, features))
    return op.Reshape(tokens, op.Concat(next(ends), length, next(ends), axis=0))
