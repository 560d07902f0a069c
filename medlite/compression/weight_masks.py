"""Which weights become zero, and how they stay zero while a net is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medlite.compression.sparse_layers import SparseLayer

ScoresByLayer = Mapping[str, Tensor]
"""How much each weight matters, by the name of its layer; tensors are shaped as the weights."""


def cubic_ramp(progress: float) -> float:
    """Share of the final sparsity that is due: 1 - (1 - progress)^3.

    Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878, equation 1, from a dense net:
    fast while there is much to spare, slow towards the end.

    >>> [cubic_ramp(progress) for progress in (0.0, 0.5, 1.0, 2.0)]
    [0.0, 0.875, 1.0, 1.0]
    """
    return 1 - (1 - min(1.0, progress)) ** 3


def masks_of_all(scores: ScoresByLayer, sparsity: float) -> dict[str, Tensor]:
    """True for the weights that stay; the lowest of all layers together go.

    Exactly `round(sparsity * number of weights)` go. A layer of small weights may lose them all.
    """
    kept = _without_lowest(torch.cat([score.flatten() for score in scores.values()]), sparsity)
    parts = kept.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def masks_of_each(scores: ScoresByLayer, sparsity: float) -> dict[str, Tensor]:
    """True for the weights that stay; every layer loses the same share, its own lowest."""
    return {
        name: _without_lowest(score.flatten(), sparsity).view(score.shape)
        for name, score in scores.items()
    }


def mask_of_blocks(score: Tensor, *, num_kept: int, block_size: int, axis: int) -> Tensor:
    """True for the highest `num_kept` of every `block_size` consecutive weights along an axis.

    Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378, for 2 of 4.
    """
    blocks = score.movedim(axis, -1).unflatten(-1, (-1, block_size))
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    mask.scatter_(-1, blocks.topk(num_kept, dim=-1).indices, value=True)
    return mask.flatten(-2).movedim(-1, axis).contiguous()


class MaskedWeight(nn.Module):
    """A parametrisation: the weight with zeros where the mask is false.

    The stored weight keeps its values there and gets no gradient for them, so that a later mask
    may bring them back. The mask is a buffer, hence part of every checkpoint.

    Args:
        mask: True for what stays, shaped as the weight.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", mask.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with."""
        return masked(weight, self.mask)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with zeros where the mask is false; unlike a product never a negative zero."""
    return torch.where(mask, weight, torch.zeros_like(weight))


def hold_masks(
    net: nn.Module, layers: Mapping[str, SparseLayer], masks: Mapping[str, Tensor]
) -> None:
    """Keep weights of `net` zero from now on, whatever an optimiser does.

    `load_held` leads back to plain weights.
    """
    for name, layer in layers.items():
        for path in layer.paths:
            module = net.get_submodule(path)
            if not parametrize.is_parametrized(module, "weight"):
                parametrize.register_parametrization(module, "weight", MaskedWeight(masks[name]))


def change_masks(
    net: nn.Module, layers: Mapping[str, SparseLayer], masks: Mapping[str, Tensor]
) -> None:
    """Give a net that holds masks other ones."""
    for name, layer in layers.items():
        for path in layer.paths:
            _parametrization(net, path).get_buffer("0.mask").copy_(masks[name])


def stored_weights(net: nn.Module, layers: Mapping[str, SparseLayer]) -> dict[str, Tensor]:
    """The weights of a net that holds masks as they are without them."""
    return {name: _parametrization(net, name).get_parameter("original").detach() for name in layers}


def load_held(net: nn.Module, held: nn.Module, layers: Mapping[str, SparseLayer]) -> None:
    """Give `net`, which holds no masks, the state of its like that holds them, zeros included."""
    state = held.state_dict()
    for layer in layers.values():
        for path in layer.paths:
            prefix = f"{path}." if path else ""
            mask = state.pop(f"{prefix}parametrizations.weight.0.mask")
            weight = state.pop(f"{prefix}parametrizations.weight.original")
            state[f"{prefix}weight"] = masked(weight, mask)
    net.load_state_dict(state)


@torch.no_grad()
def set_to_zero(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Write the zeros into plain weights, once."""
    for name, weight in weights.items():
        weight.copy_(masked(weight, masks[name]))


def _without_lowest(scores: Tensor, sparsity: float) -> Tensor:
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[scores.topk(round(sparsity * scores.numel()), largest=False).indices] = False
    return kept


def _parametrization(net: nn.Module, path: str) -> nn.Module:
    return net.get_submodule(path).get_submodule("parametrizations.weight")
