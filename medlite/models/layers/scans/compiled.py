"""The selective scan as compiled loops for float32 on the CPU, by numba.

One token after the other, sixteen channels at once, their states in the first-level cache. The
derivative keeps the states before every `STEPS`-th token, recomputes one block of tokens and
walks it back: nothing of the size B L D N is ever held. Samples, parameter sets and groups of
channels are shared out to as many threads as torch uses.

Each call starts its own threads: they cost little beside a scan that is worth sharing, and
threads that outlived a call would be missing after a fork.

Letters: B batch, P parameter sets, L tokens, D channels, N states; a row is one of B times P.
"""

# ruff: noqa: N803, PLR0917 - the letters and the argument order of the paper

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medlite.models.layers.scans.compiled_kernels import (
    STEPS,
    Operands,
    Part,
    Results,
    Scratch,
    Sizes,
    differentiate,
    scan,
)
from medlite.models.layers.scans.vectors import WIDTH

LEAST_ELEMENTS = 2**20
"""Of B L D N elements, what makes up for starting a thread."""

PARTS_OF_A_THREAD = 4

LOG2_E = math.log2(math.e)


def forward(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Outputs (B, P, L, D).

    Args:
        x: (B, P, L, D) inputs.
        delta: (B, P, L, D) step sizes, not negative.
        A: (P, D, N) negative decay rates.
        B: (B, P, L, N) input weights.
        C: (B, P, L, N) read-out weights.
        D: (P, D) weights of the direct path.
    """
    sizes = _sizes(x, A)
    operands = _flatten(x, delta, A, B, C, D)
    y = x.new_empty(*x.shape[:-1], sizes.channels)

    def scan_part(part: Part) -> None:
        scan(operands, _flat(y), _new_array(sizes.states * WIDTH), sizes, part)

    _share_out(scan_part, sizes, _num_threads(sizes))
    return y[..., : x.shape[-1]].contiguous()


def backward(
    grad: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The derivatives by x, delta, A, B, C and D.

    Args:
        grad: (B, P, L, D) the derivative by the outputs.
        x: as in `forward`, like all others.
        delta: as in `forward`.
        A: as in `forward`.
        B: as in `forward`.
        C: as in `forward`.
        D: as in `forward`.
    """
    sizes, channels = _sizes(x, A), x.shape[-1]
    operands = _flatten(x, delta, A, B, C, D)
    upstream = _flat(_fill_up(grad))
    by_x, by_delta = (x.new_empty(*x.shape[:-1], sizes.channels) for _ in range(2))
    by_rates = x.new_zeros(*x.shape[:2], sizes.states, sizes.channels)
    by_direct = x.new_zeros(*x.shape[:2], sizes.channels)
    num_threads = _num_threads(sizes)  # once: another thread may change what torch says
    weights = (
        _num_chunks(sizes, num_threads),
        *x.shape[:2],
        _round_up(sizes.length, STEPS),
        sizes.states,
    )
    by_B, by_C = x.new_empty(weights), x.new_empty(weights)
    results = Results(*map(_flat, (by_x, by_delta, by_rates, by_B, by_C, by_direct)))

    def walk_back(part: Part) -> None:
        differentiate(operands, upstream, results, _new_scratch(sizes, part), sizes, part)

    _share_out(walk_back, sizes, num_threads)
    by_rates, by_direct, by_B, by_C = (t.sum(0) for t in (by_rates, by_direct, by_B, by_C))
    return (
        by_x[..., :channels].contiguous(),
        by_delta[..., :channels].contiguous(),
        by_rates[..., :channels].transpose(1, 2).contiguous(),
        by_B[..., : sizes.length, :].contiguous(),
        by_C[..., : sizes.length, :].contiguous(),
        by_direct[:, :channels].contiguous(),
    )


def _sizes(x: Tensor, A: Tensor) -> Sizes:
    batch, sets, length, channels = x.shape
    return Sizes(batch * sets, sets, length, _round_up(channels, WIDTH), A.shape[-1])


def _flatten(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Operands:
    rates = _fill_up(A.transpose(1, 2))
    operands = (_fill_up(x), _fill_up(delta), rates, rates * LOG2_E, B, C, _fill_up(D))
    return Operands(*map(_flat, operands))


def _new_scratch(sizes: Sizes, part: Part) -> Scratch:
    group = sizes.states * (part.last - part.first)
    block = STEPS * sizes.states * WIDTH
    return Scratch(
        kept=_new_array(-(-sizes.length // STEPS) * group),
        carried=_new_array(group),
        decays=_new_array(block),
        states=_new_array(block + sizes.states * WIDTH),
        by_B=_new_array(block),
        by_C=_new_array(block),
    )


def _share_out(work: Callable[[Part], None], sizes: Sizes, num_threads: int) -> None:
    parts = _parts(sizes, num_threads)
    if num_threads == 1:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(work, parts):
            pass


def _parts(sizes: Sizes, num_threads: int) -> list[Part]:
    """All rows for a single thread; for more, some parts each, so that none waits for long."""
    num_groups = min(PARTS_OF_A_THREAD * num_threads, sizes.rows) if num_threads > 1 else 1
    chunks = _edges(sizes.channels // WIDTH, _num_chunks(sizes, num_threads))
    return [
        Part(rows, chunk, first * WIDTH, last * WIDTH)
        for rows in _edges(sizes.rows, num_groups)
        for chunk, (first, last) in enumerate(chunks)
    ]


def _edges(size: int, num_parts: int) -> list[tuple[int, int]]:
    """Where parts of about the same size begin and end."""
    edges = [size * part // max(num_parts, 1) for part in range(num_parts + 1)]
    return list(pairwise(edges))


def _num_threads(sizes: Sizes) -> int:
    elements = sizes.rows * sizes.length * sizes.channels * sizes.states
    return max(min(torch.get_num_threads(), elements // LEAST_ELEMENTS), 1)


def _num_chunks(sizes: Sizes, num_threads: int) -> int:
    """Into how many parts a row is cut: one, unless there are more threads than rows."""
    return min(-(-num_threads // max(sizes.rows, 1)), sizes.channels // WIDTH)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _fill_up(tensor: Tensor) -> Tensor:
    """Zeros behind the channels, up to whole vectors; they take part and add nothing."""
    return F.pad(tensor, (0, -tensor.shape[-1] % WIDTH))


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(-1).numpy()


def _new_array(size: int) -> np.ndarray:
    """By torch, which aligns to cache lines; numpy does not, and the kernels would be slower."""
    return torch.empty(size).numpy()
