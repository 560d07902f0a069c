"""Feature maps inside two nets, and how far one is from the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlite.errors import MedliteError, did_you_mean


@contextmanager
def tapped(net: nn.Module, paths: list[str], option: str) -> Iterator[dict[str, Tensor]]:
    """The outputs of some modules, from every forward pass of `net` while the context lasts.

    Args:
        net: whose modules are listened to.
        paths: dotted names of modules.
        option: the option that named them, for the error.

    Yields:
        The output of the last call of every module, by path.

    Raises:
        MedliteError: there is no such module.
    """
    outputs: dict[str, Tensor] = {}
    modules = dict(net.named_modules())
    for path in paths:
        if path not in modules:
            message = (
                f"{option}: {type(net).__name__} has no module '{path}', "
                f"{did_you_mean(path, modules)}"
            )
            raise MedliteError(message)
    handles = [modules[path].register_forward_hook(_keep_in(outputs, path)) for path in paths]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def deepest_features(net: nn.Module, images: Tensor) -> str:
    """The path of the module that gives the deepest feature map.

    That is the last one, in the order of execution, among those whose map (B, C, H, W[, D]) has
    the fewest pixels, but more than one: what a U-Net enlarges first, what a classifier pools.

    Raises:
        MedliteError: no module gives a map, as in a plain vision transformer.
    """
    sizes: list[tuple[int, str]] = []
    handles = [
        module.register_forward_hook(_append_size(sizes, path))
        for path, module in net.named_modules()
        if path
    ]
    try:
        net(images)
    finally:
        for handle in handles:
            handle.remove()
    if not sizes:
        message = (
            f"features: no module of {type(net).__name__} gives a map of more than one pixel; "
            "name modules in distill.features, or set distill.feature_weight=0"
        )
        raise MedliteError(message)
    fewest = min(size for size, _ in sizes)
    return [path for size, path in sizes if size == fewest][-1]


class FeatureMatching(nn.Module):
    """Squared distance between normalised feature maps of a student and a teacher.

    The student's maps go through trained 1x1 convolutions to the teacher's channels, both to the
    coarser grid of the two by average pooling, and to unit length at every pixel: the distance
    is 2 - 2 cos, in [0, 4]. FitNets (Romero et al., arXiv:1412.6550) with the normalisation of
    attention transfer (Zagoruyko and Komodakis, arXiv:1612.03928).

    Args:
        student: maps (B, C, H, W[, D]) by path, for their channels.
        teacher: the teacher's, by path.
        pairs: student path -> teacher path.
    """

    def __init__(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        pairs: Mapping[str, str],
    ) -> None:
        super().__init__()
        self._pairs = tuple(pairs.items())
        self.adapters = nn.ModuleList(
            _adapter(student[path], teacher[teacher_path]) for path, teacher_path in self._pairs
        )

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The mean distance over pairs, images and pixels."""
        distances = [
            _distance(adapter(student[path]), teacher[teacher_path])
            for adapter, (path, teacher_path) in zip(self.adapters, self._pairs, strict=True)
        ]
        return torch.stack(distances).mean()


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    grid = tuple(min(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pool: Any = F.adaptive_avg_pool2d if len(grid) == 2 else F.adaptive_avg_pool3d
    units = [F.normalize(pool(features.float(), grid), dim=1) for features in (student, teacher)]
    return (units[0] - units[1]).square().sum(1).mean()


def _adapter(student: Tensor, teacher: Tensor) -> nn.Module:
    for features in (student, teacher):
        if not _is_map(features):
            message = (
                "distill.features: a named module gives "
                f"{tuple(getattr(features, 'shape', ()))} instead of maps (B, C, H, W[, D])"
            )
            raise MedliteError(message)
    convolution = nn.Conv2d if student.ndim == 4 else nn.Conv3d
    return convolution(student.shape[1], teacher.shape[1], kernel_size=1)


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim in (4, 5)


def _keep_in(outputs: dict[str, Tensor], path: str) -> Any:
    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[path] = output

    return keep


def _append_size(sizes: list[tuple[int, str]], path: str) -> Any:
    def append(module: nn.Module, args: Any, output: Any) -> None:
        if _is_map(output) and output[0, 0].numel() > 1:
            sizes.append((output[0, 0].numel(), path))

    return append
