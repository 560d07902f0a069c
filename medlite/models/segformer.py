"""SegFormer: a Mix Transformer and a decoder of linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.models.layers.mit import MixTransformer, require_encodable

DROPOUT_RATE = 0.1
"""Of the fused channels in training, as published."""


class SegFormer(nn.Module):
    """A Mix Transformer whose four scales meet in an all-MLP decoder.

    Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with
    Transformers", arXiv 2105.15203. All scales are brought to one width by linear layers and to
    a quarter of the image's size by bilinear interpolation, joined, and fused pixel by pixel
    (section 3.2). The defaults are SegFormer-B0: 3,714,401 parameters for 3 channels and 1
    class, 3,752,694 for 150; 1.746 GMACs at 256x256, 8.388 at 512x512 and 150 classes. The
    published head ends at a quarter of the size; here its logits are interpolated (bilinear) to
    the size of the image. Any sides of 29 pixels or more are taken.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits of each pixel.
        widths: channels of each scale, divisible by its heads (1, 2, 5, 8).
        depths: blocks of each scale.
        decoder_width: channels of the decoder; 256 in B0 and B1, 768 in larger ones.
        drop_path_rate: of the last block.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_width: int = 256,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder = MixTransformer(
            in_channels, widths=widths, depths=depths, drop_path_rate=drop_path_rate
        )
        self.head = SegFormerHead(widths, decoder_width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        require_encodable(images, model="segformer")
        logits = self.head(self.encoder(images))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear")


class SegFormerHead(nn.Module):
    """The all-MLP decoder (equation 4), from the coarsest scale to the finest.

    Args:
        widths: channels of the scales.
        decoder_width: channels that each of them is brought to.
        num_classes: K.
    """

    def __init__(self, widths: Sequence[int], decoder_width: int, num_classes: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(width, decoder_width) for width in widths)
        self.fuse = nn.Sequential(
            nn.Conv2d(len(widths) * decoder_width, decoder_width, kernel_size=1, bias=False),
            nn.BatchNorm2d(decoder_width),
            nn.ReLU(),
        )
        self.classifier = nn.Conv2d(decoder_width, num_classes, kernel_size=1)

    def forward(self, scales: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H / s, W / s) -> logits (B, K, H, W), H and W those of the first map."""
        size = scales[0].shape[2:]
        resized = [
            _resize(projection(scale.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), size)
            for projection, scale in zip(self.projections, scales, strict=True)
        ]
        fused = self.fuse(torch.cat(resized[::-1], dim=1))
        if self.training:
            fused = F.dropout2d(fused, DROPOUT_RATE)
        return self.classifier(fused)


def _resize(features: Tensor, size: torch.Size) -> Tensor:
    if features.shape[2:] == size:
        return features
    return F.interpolate(features, size=size, mode="bilinear")
