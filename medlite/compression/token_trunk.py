"""The transformer inside a net: its blocks, its tokens, and which of them the logits read.

Shapes in docstrings: B batch, C channels, L tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medlite.compression.token_blocks import can_rank
from medlite.errors import MedliteError

CAPABLE = (
    "vit_tiny, vit_base, deit_tiny_distilled, transmed_t, and model=timm with a name such as "
    "deit3_small_patch16_224"
)


@dataclass(frozen=True)
class Trunk:
    """A sequence of transformer blocks.

    path: of the module that holds `blocks`. num_tokens: L before the first block, with
    num_prefix in front. num_readers: leading tokens that the logits are read from, None where
    they are read from all.
    """

    path: str
    num_blocks: int
    num_tokens: int
    num_prefix: int
    num_readers: int | None


def find_trunk(net: nn.Module, input_shape: tuple[int, ...]) -> Trunk:
    """The one trunk of `net`, a module with `blocks` and `num_prefix_tokens` as timm names them.

    Args:
        net: in evaluation mode; run on a blank image.
        input_shape: (C, H, W) of one image.

    Raises:
        MedliteError: there is none, there are several, or the blocks are of another kind.
    """
    found = [name for name, part in net.named_modules() if _is_trunk(part)]
    if len(found) != 1:
        message = (
            f"token pruning needs one vision transformer as timm builds it (`blocks` and "
            f"`num_prefix_tokens`) that ends in logits of the whole image; {type(net).__name__} "
            f"has {len(found)}. These models can: {CAPABLE}"
        )
        raise MedliteError(message)
    trunk: Any = net.get_submodule(found[0])
    others = {type(block).__name__ for block in trunk.blocks if not can_rank(block)}
    if others:
        message = (
            f"token pruning knows timm's Block with plain Attention, and {type(net).__name__} is "
            f"made of {', '.join(sorted(others))}, which may tie tokens to their places or attend "
            f"otherwise. These models can: {CAPABLE}"
        )
        raise MedliteError(message)
    blank, num_prefix = torch.zeros(1, *input_shape), trunk.num_prefix_tokens
    return Trunk(
        path=found[0],
        num_blocks=len(trunk.blocks),
        num_tokens=_num_tokens(net, trunk.blocks[0], blank),
        num_prefix=num_prefix,
        num_readers=_num_readers(net, trunk.blocks[-1], blank, num_prefix),
    )


def _is_trunk(module: nn.Module) -> bool:
    blocks = getattr(module, "blocks", None)
    is_sequence = isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks) > 0
    return is_sequence and isinstance(getattr(module, "num_prefix_tokens", None), int)


@torch.no_grad()
def _num_tokens(net: nn.Module, first_block: nn.Module, image: Tensor) -> int:
    lengths: list[int] = []
    handle = first_block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    try:
        net(image)
    finally:
        handle.remove()
    return lengths[0]


def _num_readers(
    net: nn.Module, last_block: nn.Module, image: Tensor, num_prefix: int
) -> int | None:
    if _reads(net, last_block, image, slice(num_prefix, None)):
        return None
    read = [i for i in range(num_prefix) if _reads(net, last_block, image, slice(i, i + 1))]
    return read[-1] + 1 if read else None


@torch.no_grad()
def _reads(net: nn.Module, last_block: nn.Module, image: Tensor, which: slice) -> bool:
    """Whether the logits depend on some tokens: NaN spreads to all that is computed from it."""

    def spoil(_module: nn.Module, _args: Any, tokens: Tensor) -> Tensor:
        spoilt = tokens.clone()
        spoilt[:, which] = math.nan
        return spoilt

    handle = last_block.register_forward_hook(spoil)
    try:
        return bool(net(image).isnan().any())
    finally:
        handle.remove()
