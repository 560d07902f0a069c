"""The inner loops of the compiled scan: numba kernels over flat arrays.

Arrays are flat, D is filled up with zeros to whole vectors; a row is one sample of one parameter
set, and a part some whole vectors of its channels. numba keeps compiled code by the file that
holds a kernel: after a change in `vectors` delete `__pycache__`.

Letters: B batch, P parameter sets, L tokens, D channels, N states.
"""

# ruff: noqa: N815, PLR0917 - the letters of the paper; numba takes no keywords

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np

from medlite.models.layers.scans.vectors import WIDTH, add_pairs, exp2, load, spread, store, zero

STEPS = 16
"""Tokens of a block; a multiple of `WIDTH`, so that sums over its channels fill whole vectors."""

Function = TypeVar("Function", bound=Callable[..., None])


class Sizes(NamedTuple):
    """What the arrays hold."""

    rows: int
    """B times P"""
    sets: int
    """P"""
    length: int
    channels: int
    """in whole vectors"""
    states: int


class Part(NamedTuple):
    """What a thread takes at a time: rows, and of each the channels of a chunk."""

    rows: tuple[int, int]
    """the first one, and the one after the last"""
    chunk: int
    first: int
    last: int


class Operands(NamedTuple):
    """Of the scan; rates are (P, N, D)."""

    x: np.ndarray
    delta: np.ndarray
    A: np.ndarray
    A2: np.ndarray
    """A to base 2"""
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray


class Results(NamedTuple):
    """Derivatives; those by A, B, C and D for every row, by B and C for every chunk of it."""

    x: np.ndarray
    delta: np.ndarray
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray


class Scratch(NamedTuple):
    """Of one part, in vectors: what the derivative needs beside its results.

    Sums by B and C are gathered for every channel of a vector, and added up when all groups of
    channels have passed through a block.
    """

    kept: np.ndarray
    """states before every block, of all groups of channels"""
    carried: np.ndarray
    """derivatives by the state after a block, of all groups of channels"""
    decays: np.ndarray
    states: np.ndarray
    """of a block, the one before its first token in front"""
    by_B: np.ndarray
    by_C: np.ndarray


def _kernel(function: Function) -> Function:
    """Compile at the first call, and keep the code on disk where there is a place for it."""
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(function)
    with contextlib.suppress(RuntimeError):  # numba finds no directory that can be written
        compiled.enable_caching()
    return compiled


@_kernel
def scan(operands: Operands, y: np.ndarray, state: np.ndarray, sizes: Sizes, part: Part) -> None:
    """Write the outputs of a part; `state` is scratch for N vectors."""
    for row in range(part.rows[0], part.rows[1]):
        for channel in range(part.first, part.last, WIDTH):
            _scan_group(operands, y, state, sizes, row, channel)


@_kernel
def _scan_group(
    operands: Operands, y: np.ndarray, state: np.ndarray, sizes: Sizes, row: int, channel: int
) -> None:
    x, delta, _, A2, B, C, D = operands
    for n in range(sizes.states):
        store(state, n * WIDTH, zero())
    direct = load(D, row % sizes.sets * sizes.channels + channel)
    rates = row % sizes.sets * sizes.states * sizes.channels + channel
    for t in range(row * sizes.length, (row + 1) * sizes.length):
        token = t * sizes.channels + channel
        step = load(delta, token)
        u = step * load(x, token)
        total = direct * load(x, token)
        for n in range(sizes.states):
            decay = exp2(step * load(A2, rates + n * sizes.channels))
            h = load(state, n * WIDTH) * decay + u * spread(B, t * sizes.states + n)
            store(state, n * WIDTH, h)
            total += h * spread(C, t * sizes.states + n)
        store(y, token, total)


@_kernel
def differentiate(
    operands: Operands,
    upstream: np.ndarray,
    results: Results,
    scratch: Scratch,
    sizes: Sizes,
    part: Part,
) -> None:
    """Write the derivatives of a part, of each row block by block from the last one on."""
    num_blocks = -(-sizes.length // STEPS)
    for row in range(part.rows[0], part.rows[1]):
        for channel in range(part.first, part.last, WIDTH):
            _keep_states(operands, scratch, sizes, part, row, channel)
        _clear(scratch.carried)
        for block in range(num_blocks - 1, -1, -1):
            _clear(scratch.by_B)
            _clear(scratch.by_C)
            for channel in range(part.first, part.last, WIDTH):
                _recompute(operands, upstream, scratch, sizes, part, row, channel, block)
                _walk_back(operands, upstream, results, scratch, sizes, part, row, channel, block)
            first = ((part.chunk * sizes.rows + row) * num_blocks + block) * STEPS * sizes.states
            _add_up(scratch.by_B, results.B, first)
            _add_up(scratch.by_C, results.C, first)


@_kernel
def _clear(array: np.ndarray) -> None:
    for i in range(0, array.size, WIDTH):
        store(array, i, zero())


@_kernel
def _keep_states(
    operands: Operands, scratch: Scratch, sizes: Sizes, part: Part, row: int, channel: int
) -> None:
    """The forward pass of a group of channels without its outputs."""
    x, delta, _, A2, B, _, _ = operands
    rates = row % sizes.sets * sizes.states * sizes.channels + channel
    group, num_groups = (channel - part.first) // WIDTH, (part.last - part.first) // WIDTH
    for n in range(sizes.states):
        store(scratch.states, n * WIDTH, zero())
    for s in range(sizes.length):
        if s % STEPS == 0:
            block = (s // STEPS * num_groups + group) * sizes.states * WIDTH
            for n in range(sizes.states):
                store(scratch.kept, block + n * WIDTH, load(scratch.states, n * WIDTH))
        t = row * sizes.length + s
        step = load(delta, t * sizes.channels + channel)
        u = step * load(x, t * sizes.channels + channel)
        for n in range(sizes.states):
            decay = exp2(step * load(A2, rates + n * sizes.channels))
            h = load(scratch.states, n * WIDTH) * decay + u * spread(B, t * sizes.states + n)
            store(scratch.states, n * WIDTH, h)


@_kernel
def _recompute(
    operands: Operands,
    upstream: np.ndarray,
    scratch: Scratch,
    sizes: Sizes,
    part: Part,
    row: int,
    channel: int,
    block: int,
) -> None:
    """Decays and states of a group of channels through a block, and its share of grad_C."""
    x, delta, _, A2, B, _, _ = operands
    rates = row % sizes.sets * sizes.states * sizes.channels + channel
    group, num_groups = (channel - part.first) // WIDTH, (part.last - part.first) // WIDTH
    kept = (block * num_groups + group) * sizes.states * WIDTH
    for n in range(sizes.states):
        store(scratch.states, n * WIDTH, load(scratch.kept, kept + n * WIDTH))
    for s in range(min(STEPS, sizes.length - block * STEPS)):
        t = row * sizes.length + block * STEPS + s
        step = load(delta, t * sizes.channels + channel)
        u = step * load(x, t * sizes.channels + channel)
        dy = load(upstream, t * sizes.channels + channel)
        for n in range(sizes.states):
            now = (s * sizes.states + n) * WIDTH
            decay = exp2(step * load(A2, rates + n * sizes.channels))
            h = load(scratch.states, now) * decay + u * spread(B, t * sizes.states + n)
            store(scratch.decays, now, decay)
            store(scratch.states, now + sizes.states * WIDTH, h)
            store(scratch.by_C, now, load(scratch.by_C, now) + dy * h)


@_kernel
def _walk_back(
    operands: Operands,
    upstream: np.ndarray,
    results: Results,
    scratch: Scratch,
    sizes: Sizes,
    part: Part,
    row: int,
    channel: int,
    block: int,
) -> None:
    """With G_t = dy_t C_t + r_{t+1} the derivative by h_t, and r_t = decay_t G_t."""
    x, delta, A, _, B, C, D = operands
    row_set = row % sizes.sets
    rates = row_set * sizes.states * sizes.channels + channel
    row_rates = row * sizes.states * sizes.channels + channel
    carried = (channel - part.first) * sizes.states
    direct = load(D, row_set * sizes.channels + channel)
    by_direct = load(results.D, row * sizes.channels + channel)
    for s in range(min(STEPS, sizes.length - block * STEPS) - 1, -1, -1):
        t = row * sizes.length + block * STEPS + s
        token = t * sizes.channels + channel
        step, dy = load(delta, token), load(upstream, token)
        u = step * load(x, token)
        by_u, by_step = zero(), zero()
        for n in range(sizes.states):
            now, then = (s * sizes.states + n) * WIDTH, carried + n * WIDTH
            G = load(scratch.carried, then) + dy * spread(C, t * sizes.states + n)
            store(scratch.by_B, now, load(scratch.by_B, now) + G * u)
            by_u += G * spread(B, t * sizes.states + n)
            r = G * load(scratch.decays, now)
            store(scratch.carried, then, r)
            by_exponent = r * load(scratch.states, now)
            by_step += by_exponent * load(A, rates + n * sizes.channels)
            by_rate = load(results.A, row_rates + n * sizes.channels) + by_exponent * step
            store(results.A, row_rates + n * sizes.channels, by_rate)
        by_direct += dy * load(x, token)
        store(results.x, token, by_u * step + direct * dy)
        store(results.delta, token, by_u * load(x, token) + by_step)
    store(results.D, row * sizes.channels + channel, by_direct)


@_kernel
def _add_up(vectors: np.ndarray, sums: np.ndarray, first: int) -> None:
    """Sums over each vector, one after the other from `first` on; `vectors` is used up."""
    for start in range(0, vectors.size, WIDTH * WIDTH):
        count = WIDTH
        while count > 1:
            count //= 2
            for i in range(count):
                pair = start + 2 * i * WIDTH
                joined = add_pairs(load(vectors, pair), load(vectors, pair + WIDTH))
                store(vectors, start + i * WIDTH, joined)
        store(sums, first + start // WIDTH, load(vectors, start))
