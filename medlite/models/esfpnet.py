"""ESFPNet: a Mix Transformer and a pyramid of linear layers for lesions in endoscopy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.models.layers.mit import MixTransformer, require_encodable


class ESFPNet(nn.Module):
    """A Mix Transformer and an efficient stage-wise feature pyramid (ESFP).

    Chang et al., "ESFPNet: efficient deep learning architecture for real-time lesion
    segmentation in autofluorescence bronchoscopic video", arXiv 2207.07759. From coarse to fine
    every scale is fused with the next coarser result, and all results give the logits together.
    The defaults are ESFPNet-T (MiT-B0): 3,532,129 parameters for 3 channels and 1 class, 1.407
    GMACs at 352x352; on MiT-B2 25.04 M, on B4 61.69 M. The published network ends at a quarter of
    the image's size; here its logits are interpolated (bilinear) to the size of the image. Any
    sides of 29 pixels or more are taken: a map is interpolated to the size of the finer one,
    which is the published factor of two where the sides are divisible by 32.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits of each pixel.
        widths: channels of each scale, divisible by its heads (1, 2, 5, 8).
        depths: blocks of each scale.
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
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder = MixTransformer(
            in_channels, widths=widths, depths=depths, drop_path_rate=drop_path_rate
        )
        self.decoder = FeaturePyramid(widths)
        self.head = nn.Conv2d(sum(widths), num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        require_encodable(images, model="esfpnet")
        logits = self.head(self.decoder(self.encoder(images)))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear")


class FeaturePyramid(nn.Module):
    """The efficient stage-wise feature pyramid (ESFP) decoder.

    Args:
        widths: channels of the scales, from fine to coarse.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.predictions = nn.ModuleList(LinearPrediction(width) for width in widths)
        self.fusions = nn.ModuleList(Fusion(fine, coarse) for fine, coarse in pairwise(widths))

    def forward(self, scales: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H / s, W / s) -> (B, sum of the C, H, W), H and W those of the first."""
        predicted = [layer(scale) for layer, scale in zip(self.predictions, scales, strict=True)]
        results = [predicted.pop()]
        for fusion, fine in zip(reversed(self.fusions), reversed(predicted), strict=True):
            results.append(fusion(fine, results[-1]))
        finest = results.pop()
        resized = [_resize(result, finest) for result in reversed(results)]
        return torch.cat([finest, *resized], dim=1)


class LinearPrediction(nn.Module):
    """A linear layer of the channels, which stay as many.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.proj(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Fusion(nn.Module):
    """A scale with the next coarser result, mixed point by point and predicted anew.

    Args:
        width: C, channels of the scale and of the result.
        coarse_width: C', channels of the coarser one.
    """

    def __init__(self, width: int, coarse_width: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(
            nn.Conv2d(width + coarse_width, width, kernel_size=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.prediction = LinearPrediction(width)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(B, C, H, W) and (B, C', H / 2, W / 2) -> (B, C, H, W)."""
        joined = torch.cat([fine, _resize(coarse, fine)], dim=1)
        return self.prediction(self.mix(joined))


def _resize(features: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(features, size=like.shape[2:], mode="bilinear")
