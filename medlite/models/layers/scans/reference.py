"""The selective scan as its definition: one token after the other, in float64.

Slow, and its derivative by autograd costs time that grows with the square of the length; it is
what the other forms are held against.
"""

# ruff: noqa: N803, PLR0917 - the letters and the argument order of the paper

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """As `medlite.models.layers.scans.selective.selective_scan`, in float64 whatever it is given.

    Args:
        x: (B, [P,] L, D) inputs.
        delta: (B, [P,] L, D) step sizes, not negative.
        A: ([P,] D, N) negative decay rates.
        B: (B, [P,] L, N) input weights.
        C: (B, [P,] L, N) read-out weights.
        D: ([P,] D) weights of the direct path.

    Returns:
        (B, [P,] L, D) outputs.
    """
    x, delta, A, B, C, D = (t.double() for t in (x, delta, A, B, C, D))
    u = delta * x
    state = torch.zeros(*x.shape[:-2], *A.shape[-2:], dtype=x.dtype, device=x.device)
    outputs = []
    for t in range(x.shape[-2]):
        decay = torch.exp(delta[..., t, :, None] * A)
        state = decay * state + u[..., t, :, None] * B[..., t, None, :]
        outputs.append((state * C[..., t, None, :]).sum(-1))
    return torch.stack(outputs, dim=-2) + D.unsqueeze(-2) * x


def ssd_scan_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """As `medlite.models.layers.scans.ssd.ssd_scan`: a scan whose channels repeat their head's.

    Args:
        x: (B, [P,] L, D) inputs.
        delta: (B, [P,] L, H) step sizes, not negative.
        A: ([P,] H) negative decay rates.
        B: (B, [P,] L, N) input weights.
        C: (B, [P,] L, N) read-out weights.
        D: ([P,] D) weights of the direct path.

    Returns:
        (B, [P,] L, D) outputs.
    """
    head_dim = x.shape[-1] // delta.shape[-1]
    rates = A.repeat_interleave(head_dim, -1).unsqueeze(-1).expand(*D.shape, B.shape[-1])
    return selective_scan_reference(x, delta.repeat_interleave(head_dim, -1), rates, B, C, D)


def wavefront_scan_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """As `medlite.models.layers.scans.wavefront.wavefront_scan`, pixel by pixel in float64.

    Args:
        x: (B, H, W, D) inputs.
        delta: (B, 2, H, W, D) step sizes from the left and from the top, not negative.
        A: (2, D, N) negative decay rates.
        B: (B, 2, H, W, N) input weights.
        C: (B, H, W, N) read-out weights.
        D: (D,) weights of the direct path.

    Returns:
        (B, H, W, D) outputs.
    """
    x, delta, A, B, C, D = (t.double() for t in (x, delta, A, B, C, D))
    states: dict[tuple[int, int], Tensor] = {}
    zero = torch.zeros_like(x[:, 0, 0, :, None] * A[0])

    def arriving(source: int, i: int, j: int, neighbour: Tensor) -> Tensor:
        step = delta[:, source, i, j, :, None]
        u = step * x[:, i, j, :, None] * B[:, source, i, j, None, :]
        return torch.exp(step * A[source]) * neighbour + u

    rows = []
    for i in range(x.shape[1]):
        outputs = []
        for j in range(x.shape[2]):
            left = arriving(0, i, j, states.get((i, j - 1), zero))
            top = arriving(1, i, j, states.get((i - 1, j), zero))
            inside = (left + top) / 2
            states[i, j] = left if i == 0 else top if j == 0 else inside
            outputs.append((states[i, j] * C[:, i, j, None, :]).sum(-1) + D * x[:, i, j])
        rows.append(torch.stack(outputs, 1))
    return torch.stack(rows, 1)
