"""Sixteen floats as one value inside numba kernels.

numba leaves it to LLVM to find vectors in loops, which it gives up where arrays might overlap.
Here a kernel says what a vector is: it holds `WIDTH` neighbours of a flat float32 array, adds and
multiplies, and becomes one AVX-512 register, two of AVX or four of NEON. Indices are not checked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, overload, register_model

WIDTH = 16

EXP2_COEFFICIENTS = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
"""2^r on [-1/2, 1/2], one at zero, relative error 2e-9 before rounding; highest power first."""

EXPONENT_BIAS, MANTISSA_BITS = 127, 23
"""Of IEEE float32."""

_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_INTEGERS = ir.VectorType(ir.IntType(32), WIDTH)
_CONTRACTED = ("contract",)
"""A product and a sum may become one fused operation."""


class VectorType(types.Type):
    """numba's name for `WIDTH` float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{WIDTH}")


_vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: VectorType) -> None:
        super().__init__(manager, vector, _FLOATS)


@intrinsic
def load(context: Any, array: Any, first: Any) -> Any:
    """The numbers of a flat array from index `first` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_address(context, builder, signature, arguments), align=4)

    return _vector(array, first), generate


@intrinsic
def store(context: Any, array: Any, first: Any, value: Any) -> Any:
    """Write `value` to a flat array from index `first` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature, arguments)
        builder.store(arguments[2], address, align=4)
        return context.get_dummy_value()

    return types.void(array, first, value), generate


@intrinsic
def spread(context: Any, array: Any, index: Any) -> Any:
    """One number of a flat array, in all places."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature, arguments, ir.FloatType())
        start = builder.insert_element(
            ir.Constant(_FLOATS, ir.Undefined), builder.load(address), ir.IntType(32)(0)
        )
        zeros = ir.Constant(_INTEGERS, [0] * WIDTH)
        return builder.shuffle_vector(start, start, zeros)

    return _vector(array, index), generate


@intrinsic
def zero(context: Any) -> Any:
    """All places zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _constant(0.0)

    return _vector(), generate


@intrinsic
def exp2(context: Any, exponent: Any) -> Any:
    """2 to the power of a vector that is not positive; zero from -126.5 down.

    The whole part of the exponent goes to the bits of a float, a polynomial does the rest: one
    at 0 exactly, else within 1e-7 of the value. Infinities are allowed, NaN is not kept.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lowest = _constant(-float(EXPONENT_BIAS))
        is_high = builder.fcmp_ordered(">", arguments[0], lowest)
        exponent = builder.select(is_high, arguments[0], lowest)
        whole = builder.fptosi(builder.fsub(exponent, _constant(0.5)), _INTEGERS)
        rest = builder.fsub(exponent, builder.sitofp(whole, _FLOATS))
        value = _constant(EXP2_COEFFICIENTS[0])
        for coefficient in EXP2_COEFFICIENTS[1:]:
            product = builder.fmul(value, rest, flags=_CONTRACTED)
            value = builder.fadd(product, _constant(coefficient), flags=_CONTRACTED)
        bias = ir.Constant(_INTEGERS, [EXPONENT_BIAS] * WIDTH)
        bits = builder.shl(
            builder.add(whole, bias), ir.Constant(_INTEGERS, [MANTISSA_BITS] * WIDTH)
        )
        return builder.fmul(value, builder.bitcast(bits, _FLOATS), flags=_CONTRACTED)

    return _vector(exponent), generate


@intrinsic
def add_pairs(context: Any, first: Any, second: Any) -> Any:
    """Sums of neighbours: those of `first`, then those of `second`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        even, odd = (
            builder.shuffle_vector(
                *arguments, ir.Constant(_INTEGERS, list(range(start, 2 * WIDTH, 2)))
            )
            for start in (0, 1)
        )
        return builder.fadd(even, odd)

    return _vector(first, second), generate


def _address(
    context: Any, builder: Any, signature: Any, arguments: Any, target: Any = _FLOATS
) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    element = builder.gep(array.data, [arguments[1]])
    return builder.bitcast(element, target.as_pointer())


def _constant(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * WIDTH)


def _arithmetic(instruction: str) -> Callable[..., Any]:
    """An overload of an operator between two vectors."""

    @intrinsic
    def compute(context: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, instruction)(*arguments, flags=_CONTRACTED)

        return _vector(left, right), generate

    def choose(left: Any, right: Any) -> Any:
        if left is _vector and right is _vector:
            return lambda left, right: compute(left, right)  # noqa: PLW0108 - numba wants one
        return None

    return choose


overload(operator.add, strict=False)(_arithmetic("fadd"))
overload(operator.iadd, strict=False)(_arithmetic("fadd"))
overload(operator.mul, strict=False)(_arithmetic("fmul"))
