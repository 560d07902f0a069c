"""What users run on a CPU today: mambapy's parallel scan, and the loop of the published code."""

# ruff: noqa: PLR0917 - the argument order of the paper

from __future__ import annotations

import torch
from torch import Tensor


def scan_with_mambapy(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """As the Mamba layer of mambapy (https://github.com/alxndrTL/mamba.py) does in training."""
    from mambapy.pscan import pscan

    x, delta, A, B, C, D = x[:, 0], delta[:, 0], A[0], B[:, 0], C[:, 0], D[0]
    decays = torch.exp(delta[..., None] * A)
    inputs = (delta * x)[..., None] * B[:, :, None]
    states = pscan(decays, inputs)
    return ((states @ C[..., None]).squeeze(-1) + D * x).unsqueeze(1)


def scan_by_loop(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Decays and inputs at once, then one step after the other, as `selective_scan_ref` does."""
    x, delta, A, B, C, D = x[:, 0], delta[:, 0], A[0], B[:, 0], C[:, 0], D[0]
    decays = torch.exp(torch.einsum("bld,dn->bdln", delta, A))
    inputs = torch.einsum("bld,bln->bdln", delta * x, B)
    state = x.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for t in range(x.shape[1]):
        state = decays[:, :, t] * state + inputs[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    return (torch.stack(outputs, dim=1) + D * x).unsqueeze(1)
