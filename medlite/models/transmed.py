"""TransMed-style classifier: a CNN sees patches of the modalities, a transformer all of them."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from medlite.errors import ConfigError
from medlite.models.layers.initialization import STANDARD_DEVIATION, draw_linear_layers
from medlite.models.layers.sizes import require_divisible_sides
from medlite.models.layers.timm_networks import create_timm_network, has_fixed_size

GROUP = 3
"""Modalities that are seen together, as the colours of one image."""


class TransMed(nn.Module):
    """Dai et al., "TransMed: Transformers Advance Multi-modal Medical Image Classification".

    arXiv 2103.05940, no published code: a "-style" network. The channels of an image are its
    modalities or slices. Matching patches of three of them form one small colour image; a ResNet
    turns each into a vector, a DeiT encoder relates all vectors, and the class token is read.

    Choices of ours: a fixed number of patches along each side, 4, whatever the image size, so
    that one network takes any size that 4 divides (28x28 in patches of 7x7, 224x224 of 56x56);
    channels in their given order, repeated from the first where 3 does not divide their number
    (one becomes three times itself, four become 1-2-3 and 4-1-2); the whole ResNet up to its
    mean, of which one vector a patch follows; a position for every patch of every group, no
    separate code for groups; the encoder's class token without distillation; drop path.

    TransMed-T with 3 channels and 2 classes has 16,617,602 parameters and 2.16 GMACs at 224x224;
    the paper says 17 M. Its S, B and L (43, 110 and 145 M) are met with `trunk` resnet34,
    resnet50 and resnet152 and `encoder` deit_small_patch16_224 for S, deit_base_patch16_224 for
    B and L: 42.8, 110.2 and 144.8 M.

    Args:
        in_channels: C, modalities or slices, any number.
        num_classes: K, logits.
        trunk: timm's network that looks at the patches; one that takes images of any size.
        encoder: timm's vision transformer that the layers and the class token come from.
        patches_per_side: P; sides are divisible by it, and every group gives P^2 tokens.
        drop_path_rate: of the encoder's last layer.
        pretrained: start from timm's weights of trunk and encoder.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    num_prefix_tokens: ClassVar[int] = 1
    """the class token, before those of the patches; named as in timm"""

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        trunk: str = "resnet18",
        encoder: str = "deit_tiny_patch16_224",
        patches_per_side: int = 4,
        drop_path_rate: float = 0.1,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        if patches_per_side < 1:
            raise ConfigError([f"model.patches_per_side: {patches_per_side} is less than 1"])
        if has_fixed_size(trunk):
            problem = f"model.trunk: '{trunk}' takes one image size alone; take resnet18"
            raise ConfigError([problem])
        self.patches_per_side = patches_per_side
        self.num_groups = -(-in_channels // GROUP)
        self.num_tokens = self.num_groups * patches_per_side**2
        self.trunk = create_timm_network(
            trunk,
            key="model.trunk",
            in_channels=GROUP,
            image_size=None,
            pretrained=pretrained,
            num_classes=0,
        )
        transformer = _vision_transformer(encoder, drop_path_rate, pretrained=pretrained)
        width = transformer.embed_dim
        self.proj = nn.Linear(cast("int", self.trunk.head_hidden_size), width)
        self.cls_token = cast("nn.Parameter", transformer.cls_token)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_tokens, width))
        self.blocks = transformer.blocks
        self.norm = transformer.norm
        self.head = nn.Linear(width, num_classes)
        draw_linear_layers(self.proj)
        draw_linear_layers(self.head)
        nn.init.trunc_normal_(self.pos_embed, std=STANDARD_DEVIATION)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        divisor = self.patches_per_side
        require_divisible_sides(images, model="transmed", divisor=divisor, spatial_dims=2)
        features = self.trunk(self.group_patches(images))
        tokens = self.proj(features).unflatten(0, (-1, self.num_tokens))
        first = self.cls_token.expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([first, tokens], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])

    def group_patches(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B ceil(C / 3) P P, 3, H / P, W / P)."""
        wanted = GROUP * self.num_groups
        repeats = -(-wanted // images.shape[1])
        colours = torch.cat([images] * repeats, dim=1)[:, :wanted].unflatten(1, (-1, GROUP))
        side = self.patches_per_side
        patches = colours.unflatten(4, (side, -1)).unflatten(3, (side, -1))
        return patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(0, 3)


def _vision_transformer(name: str, drop_path_rate: float, *, pretrained: bool) -> VisionTransformer:
    net = create_timm_network(
        name,
        key="model.encoder",
        in_channels=GROUP,
        image_size=None,
        pretrained=pretrained,
        num_classes=0,
        drop_path_rate=drop_path_rate,
    )
    if not isinstance(net, VisionTransformer) or net.cls_token is None:
        problem = (
            f"model.encoder: '{name}' is no vision transformer with a class token; "
            "take deit_tiny_patch16_224, deit_small_patch16_224 or deit_base_patch16_224"
        )
        raise ConfigError([problem])
    return net
