"""Any classification network of timm."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from medlite.errors import ShapeError
from medlite.models.layers.sizes import by, require_size, require_spatial_dims, try_size
from medlite.models.layers.timm_networks import (
    create_timm_network,
    grid_of,
    has_fixed_size,
    merge_branches,
)


class TimmClassifier(nn.Module):
    """Wightman, "PyTorch Image Models", doi 10.5281/zenodo.4414861: one of its networks by name.

    Args:
        in_channels: C, channels of the images.
        num_classes: K, logits.
        name: as in `timm.list_models()`.
        image_size: (H, W) of the images; None keeps the network's own size.
        pretrained: start from timm's weights.
        arguments: what else the network's constructor takes, e.g. `drop_rate`.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        name: str,
        image_size: tuple[int, ...] | None = None,
        pretrained: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.name = name
        grid = grid_of(image_size, model=name)
        self.net = create_timm_network(
            name,
            key="model.name",
            in_channels=in_channels,
            image_size=grid,
            pretrained=pretrained,
            num_classes=num_classes,
            **arguments,
        )
        self.fixed_size = grid if has_fixed_size(name) else None
        if grid is not None:
            self._require_whole_patches(grid)
            try_size(self, model=name, in_channels=in_channels, size=grid)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        require_spatial_dims(images, model=self.name, spatial_dims=2)
        if self.fixed_size is not None:
            require_size(images, model=self.name, size=self.fixed_size)
        return self.net(images)

    @property
    def distillation_heads(self) -> tuple[str, str] | None:
        """Paths of the heads that learn from labels and from a teacher; None with one head."""
        has_both = isinstance(getattr(self.net, "head_dist", None), nn.Module)
        return ("net.head", "net.head_dist") if has_both else None

    def deploy(self) -> TimmClassifier:
        """A copy with merged branches, for evaluation only: the same function, faster."""
        return merge_branches(self)

    def _require_whole_patches(self, grid: tuple[int, ...]) -> None:
        """Transformers of timm cut off what does not fill a patch, without a word."""
        patch = getattr(getattr(self.net, "patch_embed", None), "patch_size", None)
        if patch is not None and any(side % p for side, p in zip(grid, patch, strict=True)):
            mend = max(side + -side % p for side, p in zip(grid, patch, strict=True))
            message = (
                f"model={self.name} needs sides divisible by its patches of {by(patch)}, got "
                f"{by(grid)}"
            )
            raise ShapeError(message, size=(mend, mend), divisor=math.lcm(*patch))
