"""APFormer: a small U-Net whose bottleneck attends from relevant places to relevant places."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.initialization import STANDARD_DEVIATION
from medlite.models.layers.sizes import require_divisible_sides, require_size

PUBLISHED_SIZE = (256, 256)
"""(H, W) of the images, where nothing else is said."""

IRRELEVANT = 0.9
"""Queries that lie in the background with this probability or a higher one do not attend."""

PRIOR_WEIGHT = 0.01
"""Of the Gaussian in the position bias."""

MASK_SHARPNESS = 10.0
"""Slope of the sigmoid that stands for the step of a key mask in the backward pass."""


class APFormer(nn.Module):
    """Lin et al., "The Lighter The Better: Rethinking Transformers in Medical Image Segmentation".

    The title goes on "Through Adaptive Pruning"; arXiv 2206.14413. A U-Net of convolutions whose
    coarsest map, at /8, goes through transformer layers. Their position bias has a Gaussian prior.
    A query that lies in the background with probability 0.9 keeps its value, and each query drops
    the keys that matter too little to it.

    For 3 channels and 2 classes at 256x256: 2,639,106 parameters, 10.81 GMACs, 6.44 of them in
    the two products of attention. The published code has 2.640 M and 10.71 G, 6.47 in products.
    Four transformer layers and one convolution at each scale of the decoder are inferred from
    these figures, so weights of that code may not fit.

    Masks save no time. In evaluation, `keep_ratio` below 1 makes the saving real and of a fixed
    size, so that it can be exported with any batch: the queries most likely not background, as
    many in each image, are gathered, attend, and are written back; the threshold still holds
    among them. Where no more than these pass it, the logits are those of the dense form. With
    0.5 it takes 7.19 GMACs, with 0.25 it takes 5.38. In training all queries are computed.

    Ours are: gradients of both masks, straight through a sigmoid (keys) and through the
    probability (queries); gates that are learnt, not annealed; distances in sides of the map;
    widths of the Gaussians that start at 0.1, 0.2 ... Left out, as they need more than logits:
    the warm-up with a loss on the unpruned attention, and the loss on the query probabilities.

    Sides are divisible by 8 with four widths; the network is built for one size.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits of each pixel.
        image_size: (H, W) of the images; None stands for 256x256.
        widths: channels at the scales; the last are those of the tokens.
        depth: transformer layers.
        num_heads: of attention.
        head_dim: channels of a head.
        mlp_width: hidden channels of the transformer's MLPs.
        keep_ratio: share of the queries that attend in evaluation, in (0, 1]; 1 is published.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, ...] | None = None,
        widths: tuple[int, ...] = (16, 32, 64, 128),
        depth: int = 4,
        num_heads: int = 6,
        head_dim: int = 128,
        mlp_width: int = 512,
        keep_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < keep_ratio <= 1:
            raise ConfigError([f"model.keep_ratio: {keep_ratio} is not in (0, 1]"])
        self.image_size = tuple(PUBLISHED_SIZE if image_size is None else image_size)
        self.stride = 2 ** (len(widths) - 1)
        self._require_sides(torch.empty(1, in_channels, *self.image_size, device="meta"))
        height, width = (side // self.stride for side in self.image_size)
        num_queries = math.ceil(keep_ratio * height * width)
        self.encoders = nn.ModuleList(
            nn.Sequential(_conv3x3(fine, coarse), _conv3x3(coarse, coarse))
            for fine, coarse in zip((in_channels, *widths), widths, strict=False)
        )
        self.layers = nn.Sequential(*[
            PrunedLayer(
                PrunedAttention(widths[-1], (height, width), num_heads, head_dim),
                widths[-1],
                mlp_width,
                num_queries=None if num_queries == height * width else num_queries,
            )
            for _ in range(depth)
        ])  # fmt: skip
        self.decoders = nn.ModuleList(
            _conv3x3(coarse + fine, fine)
            for coarse, fine in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        self._require_sides(images)
        require_size(images, model="apformer", size=self.image_size)
        features = images
        scales: list[Tensor] = []
        for encoder in self.encoders:
            features = encoder(F.max_pool2d(features, 2) if scales else features)
            scales.append(features)
        tokens = self.layers(features.flatten(2).transpose(1, 2))
        features = tokens.transpose(1, 2).unflatten(2, features.shape[2:])
        for decoder, skip in zip(self.decoders, scales[-2::-1], strict=True):
            wide = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=True)
            features = decoder(torch.cat([skip, wide], dim=1))
        return self.head(features)

    def _require_sides(self, images: Tensor) -> None:
        require_divisible_sides(images, model="apformer", divisor=self.stride, spatial_dims=2)


class PrunedLayer(nn.Module):
    """A transformer layer whose irrelevant queries skip the attention (query-wise pruning).

    Args:
        attention: from some queries to all tokens.
        width: C, channels of the tokens.
        mlp_width: hidden channels of the MLP.
        num_queries: Q, those that attend in evaluation; None computes all and masks.
    """

    def __init__(
        self,
        attention: PrunedAttention,
        width: int,
        mlp_width: int,
        *,
        num_queries: int | None = None,
    ) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.classifier = nn.Linear(width, 2)
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width), nn.ReLU(), nn.Linear(mlp_width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        background, relevance = self.classifier(tokens).softmax(dim=-1).split(1, dim=-1)
        keep = (background < IRRELEVANT).to(tokens.dtype)
        if self.training:
            keep = _straight_through(keep, relevance)
        normed = self.norm1(tokens)
        if self.training or self.num_queries is None:
            tokens = tokens + keep * self.attention(normed, normed)
        else:
            rows = relevance[..., 0].topk(self.num_queries, dim=1).indices
            index = rows[..., None].expand(-1, -1, tokens.shape[2])
            update = self.attention(normed.gather(1, index), normed, rows)
            chosen = tokens.gather(1, index) + keep.gather(1, rows[..., None]) * update
            tokens = tokens.scatter(1, index, chosen)
        return tokens + self.mlp(self.norm2(tokens))


class PrunedAttention(nn.Module):
    """Attention in which each query drops its least keys (dependency-wise pruning).

    A weight is kept where it exceeds min + s(w q) s(g) (max - min), with the least and the
    largest weight of its query, the sigmoid s, a vector w and a gate g; those kept sum up to 1.

    Args:
        width: C, channels of the tokens.
        size: (H, W) of their map; L is H W.
        num_heads: of attention.
        head_dim: channels of a head.
    """

    def __init__(self, width: int, size: tuple[int, int], num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.to_queries = nn.Linear(width, inner, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * inner, bias=False)
        self.position = GaussianPosition(size, num_heads)
        self.threshold = nn.Linear(head_dim, 1)
        self.gate = nn.Parameter(torch.tensor([-2.0]))
        self.out = nn.Linear(inner, width)

    def forward(self, queries: Tensor, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """(B, Q, C) and (B, L, C) -> (B, Q, C); `rows` (B, Q) are the queries' places in L."""
        q = self._heads(self.to_queries(queries))
        keys, values = self.to_keys_values(tokens).chunk(2, dim=-1)
        scores = q @ self._heads(keys).transpose(2, 3) * q.shape[3] ** -0.5
        weights = (scores + self._bias(rows)).softmax(dim=-1)
        mixed = self._drop_keys(weights, q) @ self._heads(values)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, channels: Tensor) -> Tensor:
        return channels.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _bias(self, rows: Tensor | None) -> Tensor:
        bias = self.position()
        if rows is None:
            return bias.transpose(0, 1)
        picked = F.embedding(rows, bias.flatten(1))
        return picked.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _drop_keys(self, weights: Tensor, q: Tensor) -> Tensor:
        """(B, heads, Q, L) and (B, heads, Q, head_dim) -> (B, heads, Q, L)."""
        largest, least = weights.amax(dim=-1, keepdim=True), weights.amin(dim=-1, keepdim=True)
        # The largest weight always has height 1, so no query loses all keys
        span = (largest - least).clamp_min(torch.finfo(weights.dtype).tiny)
        height = 1 - (largest - weights) / span
        margin = height - self.threshold(q).sigmoid() * self.gate.sigmoid()
        keep = (margin > 0).to(weights.dtype)
        if self.training:
            keep = _straight_through(keep, (MASK_SHARPNESS * margin).sigmoid())
        kept = weights * keep
        return kept / kept.sum(dim=-1, keepdim=True)


class GaussianPosition(nn.Module):
    """The relative position bias with a Gaussian prior (GRPE).

    For an offset (y, x): a learnt number plus 0.01 exp(-(y^2 + x^2) / 2 w^2), with a width w for
    each head; offsets are in units of the map's longer side.

    Args:
        size: (H, W) of the map; L is H W.
        num_heads: biases of each pair.
    """

    rows: Tensor
    columns: Tensor
    squares: Tensor

    def __init__(self, size: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.size = size
        offsets = [torch.arange(1 - side, side) / max(size) for side in size]
        squares = offsets[0][:, None] ** 2 + offsets[1] ** 2
        self.table = nn.Parameter(torch.zeros(squares.numel(), num_heads))
        self.gaussian_widths = nn.Parameter(0.1 * torch.arange(1, num_heads + 1))
        nn.init.trunc_normal_(self.table, std=STANDARD_DEVIATION)
        self.register_buffer("squares", squares.reshape(-1, 1), persistent=False)
        for name, side in zip(("rows", "columns"), size, strict=True):
            places = torch.arange(side)
            pairs = places[:, None] - places + side - 1
            self.register_buffer(name, pairs.flatten(), persistent=False)

    def forward(self) -> Tensor:
        """The biases of all pairs, (L, heads, L) with queries first."""
        H, W = self.size
        prior = torch.exp(-self.squares / (2 * self.gaussian_widths**2 + 1e-6))
        biases = (self.table + PRIOR_WEIGHT * prior).unflatten(0, (2 * H - 1, 2 * W - 1))
        pairs = biases.index_select(0, self.rows).index_select(1, self.columns)
        pairs = pairs.unflatten(1, (W, W)).unflatten(0, (H, H))
        return pairs.permute(0, 2, 4, 1, 3).reshape(H * W, -1, H * W)


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard` with the gradient of `soft` (Bengio et al., arXiv 1308.3432)."""
    return hard + (soft - soft.detach())


def _conv3x3(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )
