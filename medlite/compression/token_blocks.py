"""A transformer block that passes on only the tokens that matter most.

Shapes in docstrings: B batch, C channels, L tokens, P prefix tokens (class, distillation,
registers), which come first; Q queries that rank, S tokens that are kept beside the prefix.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def can_rank(block: nn.Module) -> bool:
    """Whether a block computes what timm's `Block` with its plain `Attention` does.

    Subclasses are taken if they leave both forward passes as they are.
    """
    attention = getattr(block, "attn", None)
    return (
        type(block).forward is Block.forward
        and isinstance(attention, nn.Module)
        and type(attention).forward is Attention.forward
    )


class TokenDroppingBlock(nn.Module):
    """A block whose MLP, and whatever follows it, sees a fixed number of tokens.

    The layers are those of `block`, under the same names, so weights keep their names.

    Args:
        block: of timm, as `can_rank` wants it.
        num_prefix: P.
        num_kept: S.
        num_queries: Q, leading tokens whose attention ranks the others; None takes all tokens.
        fuses: whether the tokens that are dropped live on as one, their weighted mean.
    """

    norm1: nn.Module
    attn: RankingAttention
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(
        self,
        block: Block,
        *,
        num_prefix: int,
        num_kept: int,
        num_queries: int | None,
        fuses: bool,
    ) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.attn = RankingAttention(cast("Attention", block.attn), num_queries=num_queries)
        self.num_prefix = num_prefix
        self.num_kept = num_kept
        self.fuses = fuses
        self.train(block.training)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, P + S, C), with one token more where it fuses."""
        update, importance = self.attn(self.norm1(tokens))
        tokens = tokens + self.drop_path1(self.ls1(update))
        tokens = self.select(tokens, importance[:, self.num_prefix :])
        return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))

    def select(self, tokens: Tensor, importance: Tensor) -> Tensor:
        """(B, L, C) and the others' importance (B, L - P) -> the prefix and what is kept."""
        chosen = importance.topk(self.num_kept, dim=1).indices
        # Counted without a device, which an exported graph could not leave again
        image = torch.ones_like(chosen).cumsum(dim=0) - 1
        rows = image * tokens.shape[1] + self.num_prefix + chosen
        parts = [F.embedding(rows, tokens.flatten(0, 1))]
        if self.num_prefix:
            parts.insert(0, tokens[:, : self.num_prefix])
        if self.fuses:
            rest = importance.scatter(1, chosen, 0.0)
            total = rest.sum(dim=1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
            parts.append((rest / total)[:, None] @ tokens[:, self.num_prefix :])
        return torch.cat(parts, dim=1)


class RankingAttention(nn.Module):
    """timm's attention, fused, which also tells how much attention each token gets.

    Only the rows of the queries that rank are computed a second time, outside the fused kernel.

    Args:
        attention: its layers are taken over, under the same names.
        num_queries: Q; None takes all tokens.
    """

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, attention: Attention, *, num_queries: int | None) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.gate = self._modules.get("gate")
        self.num_heads = attention.num_heads
        self.head_dim = attention.head_dim
        self.num_queries = num_queries

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C) -> (B, L, C) and the attention that each token gets, (B, L).

        The second sums up to 1: the softmax over the tokens, its mean over heads and queries.
        """
        heads = self.qkv(tokens).unflatten(2, (3, self.num_heads, self.head_dim))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind(0)
        queries, keys = self.q_norm(queries), self.k_norm(keys)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        mixed = self.norm(mixed.transpose(1, 2).flatten(2))
        if self.gate is not None:
            mixed = mixed * self.gate(tokens).sigmoid()
        return self.proj_drop(self.proj(mixed)), self._importance(queries, keys)

    def _importance(self, queries: Tensor, keys: Tensor) -> Tensor:
        if self.num_queries is not None:
            queries = queries[:, :, : self.num_queries]
        scores = (self.head_dim**-0.5 * queries) @ keys.transpose(2, 3)
        return scores.softmax(dim=-1).mean(dim=(1, 2))
