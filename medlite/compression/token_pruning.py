"""Token pruning: the parts of an image that matter least leave a vision transformer on its way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from medlite.compression.checks import check_options, training_rules
from medlite.compression.copies import evaluation_copy
from medlite.compression.order import Stage
from medlite.compression.token_blocks import TokenDroppingBlock
from medlite.compression.token_trunk import CAPABLE, Trunk, find_trunk
from medlite.errors import ConfigError, MedliteError
from medlite.types import CompressionContext, DataSpec

ROUNDING = 1e-9
"""0.1 of 30 tokens are 3, not the 4 that binary fractions make of it"""


@dataclass(frozen=True, kw_only=True)
class TokenPruning:
    """Drops tokens inside a vision transformer, in a fixed number, and trains on.

    Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations" (EViT), arXiv:2202.07800, section 3: between the attention and the MLP of
    some blocks, the patches to which the class token attends most go on, and the others become
    one token, weighted by that attention. Which blocks and how many follow Rao et al.,
    "DynamicViT", arXiv:2106.02034, section 3: after each quarter of the depth, 0.7 of what is left.
    Tokens are gathered, never masked, so they are saved in every runtime; the numbers are fixed
    for an image size, so shapes are static.

    Where the logits are read from the class and the distillation token, the attention of both
    ranks; where they are read from all tokens (average or attention pooling), there is no such
    token to ask and the attention that a token gets from all others ranks, as in Yang et al.,
    "VisionZip", arXiv:2412.04467, section 3.2, which needs the whole matrix of scores in these
    blocks. No weight is added. The merged token is a mean (EViT's is a sum, smaller than any
    token), the ratio is reached at once (EViT's falls over the training), and an average pooling
    counts the merged token as one.

    Close ranks can be told apart otherwise by another runtime or in INT8: then another token goes.

    Args:
        keep_ratio: share of the tokens, beside class, distillation and registers, that goes on
            at each place, rounded up.
        epochs: further epochs afterwards, on all training data.
        learning_rate: peak learning rate; about a third of the first training's.
        blocks: where tokens go, counted from 0; None is after each quarter of the depth: 3, 6
            and 9 of 12.
        fuse: merge the tokens that go into one more token.
    """

    stage: ClassVar[Stage] = "structure"

    epochs: int
    learning_rate: float
    keep_ratio: float = 0.7
    blocks: Sequence[int] | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        given = self.blocks
        is_right = given is None or bool(given and min(given) >= 0 and len({*given}) == len(given))
        check_options(
            [
                *training_rules(self.epochs, self.learning_rate),
                ("keep_ratio", self.keep_ratio, 0 < self.keep_ratio < 1, "in (0, 1)"),
                ("blocks", given, is_right, "null or different numbers of blocks from 0 up"),
            ]
        )

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the net that drops tokens, trained, and where; `net` stays as it is.

        Raises:
            MedliteError: the net is not a vision transformer that can do with fewer tokens.
            ConfigError: there is no such block.
        """
        input_shape = context.spec.input_shape
        if context.spec.task != "classification":
            message = (
                "token pruning is for nets that give one answer an image, and "
                f"{type(net).__name__} gives one for every place of it. These models can: {CAPABLE}"
                "; for segmentation, model=apformer skips places by itself with "
                "model.keep_ratio=0.5"
            )
            raise MedliteError(message)
        thin = evaluation_copy(net)
        trunk = find_trunk(thin, input_shape)
        places = self._places(trunk)
        kept = dict(self._plan(trunk, places))
        if not kept:
            message = (
                f"no token can go: {type(net).__name__} has {trunk.num_tokens} for an image of "
                f"{'x'.join(map(str, input_shape[1:]))}, and keep_ratio {self.keep_ratio} "
                f"{'and one merged token ' if self.fuse else ''}leave as many; lower "
                "compression.prune_tokens.keep_ratio or enlarge dataset.image_size"
            )
            raise MedliteError(message)
        state = {
            "path": trunk.path,
            "num_kept": kept,
            "num_prefix": trunk.num_prefix,
            "num_queries": trunk.num_readers,
            "fuses": self.fuse,
        }
        _drop_tokens(thin, state)
        _require_logits(thin, net, input_shape)
        context.report("token pruning", self._describe(trunk, kept, places))
        trained = context.fit(
            thin, name="prune_tokens", epochs=self.epochs, learning_rate=self.learning_rate
        )
        return trained, state

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Let a copy of `net` drop tokens in the same blocks; its weights are still to load."""
        thin = evaluation_copy(net)
        _drop_tokens(thin, state)
        return thin

    def _places(self, trunk: Trunk) -> list[int]:
        """The blocks that were asked for, in their order."""
        depth = trunk.num_blocks
        if self.blocks is None:
            return sorted({quarter * depth // 4 for quarter in (1, 2, 3)})
        if max(self.blocks) >= depth:
            problem = (
                f"compression.prune_tokens.blocks: {list(self.blocks)} names a block that is not "
                f"there; the net has {depth}, from 0 to {depth - 1}"
            )
            raise ConfigError([problem])
        return sorted(self.blocks)

    def _plan(self, trunk: Trunk, places: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(block, tokens that it keeps beside the prefix), where that saves some."""
        num_patches = trunk.num_tokens - trunk.num_prefix
        for place in places:
            num_kept = math.ceil(self.keep_ratio * num_patches - ROUNDING)
            if num_kept + self.fuse < num_patches:
                yield place, num_kept
                num_patches = num_kept + self.fuse

    def _describe(self, trunk: Trunk, kept: dict[int, int], places: Sequence[int]) -> str:
        lengths = [trunk.num_tokens]
        lengths += [trunk.num_prefix + num_kept + self.fuse for num_kept in kept.values()]
        idle = [place for place in places if place not in kept]
        ranking = "from all tokens"
        if trunk.num_readers is not None:
            tokens = (
                "class token" if trunk.num_readers == 1 else f"first {trunk.num_readers} tokens"
            )
            ranking = f"from the {tokens}"
        return (
            f"from {', '.join(map(str, lengths[:-1]))} to {lengths[-1]} tokens in blocks "
            f"{', '.join(map(str, kept))} of {trunk.num_blocks} (counted from 0), by the attention "
            f"that they get {ranking}; those that go are "
            f"{'merged into one' if self.fuse else 'lost'}"
            + (f"; too few tokens to drop any in {', '.join(map(str, idle))}" if idle else "")
        )


def _drop_tokens(net: nn.Module, state: dict[str, Any]) -> None:
    trunk: Any = net.get_submodule(state["path"])
    for place, num_kept in state["num_kept"].items():
        trunk.blocks[place] = TokenDroppingBlock(
            trunk.blocks[place],
            num_prefix=state["num_prefix"],
            num_kept=num_kept,
            num_queries=state["num_queries"],
            fuses=state["fuses"],
        )


@torch.no_grad()
def _require_logits(thin: nn.Module, net: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Run once: fewer tokens may not be what follows the blocks can work with."""
    try:
        thin(torch.zeros(2, *input_shape))
    except (RuntimeError, ValueError) as error:
        message = (
            f"tokens cannot be pruned in {type(net).__name__}: what follows its blocks needs a "
            f"token for every place of the image. These models can: {CAPABLE}"
        )
        raise MedliteError(message) from error
