"""UltraLight VM-UNet: a skin-lesion segmentation network of 49,457 parameters."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.models.layers.mamba import mamba_block
from medlite.models.layers.sizes import require_divisible_sides
from medlite.models.layers.ssm import S6, Ssm

NUM_QUARTERS = 4


class UltraLightVMUNet(nn.Module):
    """Wu et al., "UltraLight VM-UNet: Parallel Vision Mamba Significantly Reduces Parameters".

    arXiv 2403.20035. Convolutions at the three finest scales and parallel Mamba layers at the
    three coarsest, on both sides of a U whose skip connections pass an attention bridge. The
    same function as the published code with two differences: the quarters that share one Mamba
    are folded into the batch (6 scans instead of 24), and logits are returned instead of
    probabilities. Sides are divisible by 32.

    Args:
        in_channels: C, channels of the images; 3 give the published size.
        num_classes: K, logits of each pixel.
        widths: channels at the six scales, divisible by 4.
        ssm: the recurrence of the scans.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, int, int, int, int, int] = (8, 16, 24, 32, 48, 64),
        ssm: Ssm = S6,
    ) -> None:
        super().__init__()
        w1, w2, w3, w4, w5, w6 = widths
        self.encoders = nn.ModuleList([
            _EncoderStage(_conv3x3(in_channels, w1), w1),
            _EncoderStage(_conv3x3(w1, w2), w2),
            _EncoderStage(_conv3x3(w2, w3), w3),
            _EncoderStage(ParallelMamba(w3, w4, ssm), w4),
            _EncoderStage(ParallelMamba(w4, w5, ssm), w5),
        ])  # fmt: skip
        self.bottleneck = ParallelMamba(w5, w6, ssm)
        self.spatial_bridge = _SpatialBridge()
        self.channel_bridge = _ChannelBridge(widths[:5])
        self.decoders = nn.ModuleList([
            _DecoderStage(ParallelMamba(w6, w5, ssm), w5, scale=1),
            _DecoderStage(ParallelMamba(w5, w4, ssm), w4),
            _DecoderStage(ParallelMamba(w4, w3, ssm), w3),
            _DecoderStage(_conv3x3(w3, w2), w2),
            _DecoderStage(_conv3x3(w2, w1), w1),
        ])  # fmt: skip
        self.head = nn.Conv2d(w1, num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        require_divisible_sides(images, model="ultralight_vm_unet", divisor=32, spatial_dims=2)
        features = images
        scales = []
        for encoder in self.encoders:
            features = encoder(features)
            scales.append(features)
        features = F.gelu(self.bottleneck(features))
        attended = [self.spatial_bridge(scale) for scale in scales]
        bridged = self.channel_bridge([a + s for a, s in zip(attended, scales, strict=True)])
        skips = [a + b for a, b in zip(attended, bridged, strict=True)]
        for decoder, skip in zip(self.decoders, reversed(skips), strict=True):
            features = decoder(features) + skip
        return _upsample(self.head(features), scale=2)


class ParallelMamba(nn.Module):
    """The parallel vision Mamba layer (PVM, figure 3 of the paper).

    The channels go through one Mamba block in four quarters, each added to its scaled input;
    the same normalisation stands before and after.

    Args:
        in_channels: divisible by 4.
        out_channels: free.
        ssm: the recurrence of the scan.
    """

    def __init__(self, in_channels: int, out_channels: int, ssm: Ssm = S6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.mamba = mamba_block(in_channels // NUM_QUARTERS, ssm)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(in_channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        size = features.shape[2:]
        tokens = self.norm(features.flatten(2).transpose(1, 2))
        quarters = tokens.unflatten(2, (NUM_QUARTERS, -1)).transpose(1, 2).flatten(0, 1)
        mixed = self.mamba(quarters) + self.skip_scale * quarters
        tokens = mixed.unflatten(0, (-1, NUM_QUARTERS)).transpose(1, 2).flatten(2)
        return self.proj(self.norm(tokens)).transpose(1, 2).unflatten(2, size)


class _EncoderStage(nn.Module):
    """Features at half the size."""

    def __init__(self, mixer: nn.Module, channels: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, features: Tensor) -> Tensor:
        return F.gelu(F.max_pool2d(self.norm(self.mixer(features)), 2))


class _DecoderStage(nn.Module):
    """Features at `scale` times the size."""

    def __init__(self, mixer: nn.Module, channels: int, scale: int = 2) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = nn.GroupNorm(4, channels)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return F.gelu(_upsample(self.norm(self.mixer(features)), self.scale))


class _SpatialBridge(nn.Module):
    """Weights every pixel by its mean and largest channel; one set of weights for all scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=9, dilation=3)

    def forward(self, features: Tensor) -> Tensor:
        summary = torch.cat([features.mean(1, keepdim=True), features.amax(1, keepdim=True)], 1)
        return features * self.conv(summary).sigmoid()


class _ChannelBridge(nn.Module):
    """Weights every channel of every scale by the means of all channels of all scales."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size=3, padding=1, bias=False)
        self.gates = nn.ModuleList(nn.Linear(sum(widths), width) for width in widths)

    def forward(self, scales: list[Tensor]) -> list[Tensor]:
        means = torch.cat([scale.mean((2, 3)) for scale in scales], dim=1)
        summary = self.conv(means[:, None])[:, 0]
        gates = [gate(summary).sigmoid()[:, :, None, None] for gate in self.gates]
        return [gate * scale for gate, scale in zip(gates, scales, strict=True)]


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def _upsample(features: Tensor, scale: int) -> Tensor:
    if scale == 1:
        return features
    return F.interpolate(features, scale_factor=scale, mode="bilinear", align_corners=True)
