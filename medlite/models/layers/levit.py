"""The layers of LeViT: attention with learned biases of place, and batch-normalised linear layers.

Graham et al., "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference", arXiv
2104.01136. Tokens (B, L, C) are the places of a grid (H, W), row by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]

SHRINKING_STRIDE = 2


class LinearNorm(nn.Module):
    """A linear layer whose bias is that of a batch normalisation after it.

    Args:
        in_features: C, of each token.
        out_features: C'.
        first_scale: of the normalisation; 0 starts a residual branch as nothing.
    """

    def __init__(self, in_features: int, out_features: int, *, first_scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.norm = nn.BatchNorm1d(out_features)
        nn.init.constant_(self.norm.weight, first_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C')."""
        normalised = self.norm(self.linear(tokens).flatten(0, 1))
        return normalised.unflatten(0, (-1, tokens.shape[1]))


class LevitAttention(nn.Module):
    """Attention whose scores know how far apart query and key are.

    Args:
        width: C, channels.
        num_heads: N.
        key_dim: D, of a head's queries and keys.
        value_ratio: channels of a head's values, in units of D.
        grid: (H, W) of the tokens.
    """

    def __init__(
        self, width: int, *, num_heads: int, key_dim: int, value_ratio: int, grid: Grid
    ) -> None:
        super().__init__()
        value_dim = value_ratio * key_dim
        self.head_parts = [key_dim, key_dim, value_dim]
        self.qkv = LinearNorm(width, num_heads * sum(self.head_parts))
        self.bias = PlaceBias(num_heads, grid, stride=1)
        self.proj = nn.Sequential(
            nn.Hardswish(), LinearNorm(num_heads * value_dim, width, first_scale=0)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        heads = _by_head(self.qkv(tokens), sum(self.head_parts))
        query, key, value = heads.split(self.head_parts, dim=3)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias())
        return self.proj(attended.transpose(1, 2).flatten(2))


class ShrinkingAttention(nn.Module):
    """Attention in which every second token of every second row asks.

    Args:
        in_width: C, channels.
        out_width: C'.
        num_heads: N.
        key_dim: D, of a head's queries and keys.
        value_ratio: channels of a head's values, in units of D.
        grid: (H, W) of the tokens.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        num_heads: int,
        key_dim: int,
        value_ratio: int,
        grid: Grid,
    ) -> None:
        super().__init__()
        value_dim = value_ratio * key_dim
        self.grid, self.head_parts = grid, [key_dim, value_dim]
        self.q = LinearNorm(in_width, num_heads * key_dim)
        self.kv = LinearNorm(in_width, num_heads * sum(self.head_parts))
        self.bias = PlaceBias(num_heads, grid, stride=SHRINKING_STRIDE)
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(num_heads * value_dim, out_width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H W, C) -> (B, ceil(H / 2) ceil(W / 2), C')."""
        rows = tokens.unflatten(1, self.grid)
        asking = rows[:, ::SHRINKING_STRIDE, ::SHRINKING_STRIDE].flatten(1, 2)
        query = _by_head(self.q(asking), self.head_parts[0])
        key, value = _by_head(self.kv(tokens), sum(self.head_parts)).split(self.head_parts, dim=3)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias())
        return self.proj(attended.transpose(1, 2).flatten(2))


class PlaceBias(nn.Module):
    """One learned number for each head and each pair of distances, down and across.

    Args:
        num_heads: N.
        grid: (H, W) of the keys.
        stride: of the queries, on the grid of the keys.
    """

    index: Tensor

    def __init__(self, num_heads: int, grid: Grid, *, stride: int) -> None:
        super().__init__()
        height, width = grid
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, height * width))
        down, across = _distances(height, stride), _distances(width, stride)
        index = down[:, None, :, None] * width + across[None, :, None, :]
        self.register_buffer("index", index.flatten(2).flatten(0, 1), persistent=False)

    def forward(self) -> Tensor:
        """(N, queries, keys)."""
        return self.attention_biases[:, self.index]


class Residual(nn.Module):
    """What a branch gives is added to what it takes.

    Args:
        branch: the layer.
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return tokens + self.branch(tokens)


def levit_mlp(width: int, ratio: int) -> Residual:
    """The residual feed-forward of a token, `ratio` times as wide inside."""
    return Residual(
        nn.Sequential(
            LinearNorm(width, ratio * width),
            nn.Hardswish(),
            LinearNorm(ratio * width, width, first_scale=0),
        )
    )


def shrunk(grid: Grid) -> Grid:
    """The grid of the tokens that a shrinking attention gives.

    >>> shrunk((7, 4))
    (4, 2)
    """
    height, width = grid
    return -(-height // SHRINKING_STRIDE), -(-width // SHRINKING_STRIDE)


def _by_head(tokens: Tensor, head_dim: int) -> Tensor:
    """(B, L, N D) -> (B, N, L, D)."""
    return tokens.unflatten(2, (-1, head_dim)).transpose(1, 2)


def _distances(side: int, stride: int) -> Tensor:
    """(queries, keys) along one side."""
    places = torch.arange(side)
    return (places[::stride, None] - places).abs()
