"""What zeros in the weights amount to: how many there are, and what they are good for."""

from __future__ import annotations

import gzip
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medlite.compression.sparse_layers import SparseLayer, find_layers
from medlite.export.trace import deployable

ZerosByLayer = Mapping[str, tuple[int, int]]
"""(zeros, weights) of each layer"""


def count_zeros(net: nn.Module, layers: Mapping[str, SparseLayer]) -> dict[str, tuple[int, int]]:
    """(zeros, weights) of each layer, by name."""
    weights = {name: net.get_submodule(name).get_parameter("weight") for name in layers}
    return {name: (int((w == 0).sum()), w.numel()) for name, w in weights.items()}


def describe_zeros(net: nn.Module, zeros: ZerosByLayer) -> str:
    """How many weights are zero: in the layers that were chosen, in the net, and as deployed."""
    num_zeros, num_weights = _totals(zeros)
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    empty = [name for name, (zero, count) in zeros.items() if zero == count]
    text = (
        f"{num_zeros / num_weights:.1%} of the {num_weights:,} weights of {len(zeros)} layers are "
        f"zero, {num_zeros / num_parameters:.1%} of all {num_parameters:,} parameters"
    )
    if callable(getattr(net, "deploy", None)):
        deployed = deployable(net)
        num_zeros, num_weights = _totals(count_zeros(deployed, find_layers(deployed)))
        text += (
            f"; re-parameterised for deployment {num_zeros / num_weights:.1%} of {num_weights:,} "
            "weights of all layers, as merged branches share few zeros"
        )
    return text + (f"; without any weight left: {', '.join(empty)}" if empty else "")


def describe_practice(dense: nn.Module, net: nn.Module, pattern: str) -> str:
    """What the zeros save, measured where that can be, and what they do not save."""
    hardware = (
        "2:4 is made for the sparse tensor cores of NVIDIA GPUs from Ampere on (TensorRT), which "
        "was not measured"
        if pattern == "2:4"
        else "sparse tensor cores (NVIDIA Ampere and later, TensorRT) take pattern 2:4 only"
    )
    before, after = (_gzip_size(some) for some in (dense, net))
    return (
        f"gzip makes the weights {after / 1024:,.1f} KiB, {before / 1024:,.1f} KiB without "
        f"the zeros (ratio {after / before:.2f}); files that are not compressed stay as large, and "
        "runtimes for dense weights (ONNX Runtime, OpenVINO) run no faster; "
        f"{hardware}"
    )


def _totals(zeros: ZerosByLayer) -> tuple[int, int]:
    return sum(zero for zero, _ in zeros.values()), sum(count for _, count in zeros.values())


def _gzip_size(net: nn.Module) -> int:
    tensors = {id(t): t for t in (*net.parameters(), *net.buffers())}
    content = b"".join(_to_bytes(tensor) for tensor in tensors.values())
    return len(gzip.compress(content, mtime=0))


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
