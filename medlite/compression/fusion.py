"""Fusion: branches become one layer, batch normalisation a part of the layer before it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from medlite.compression.checks import check_options
from medlite.compression.copies import evaluation_copy, freeze_like
from medlite.compression.net_difference import first_difference, relative_difference
from medlite.compression.norm_folding import find_folds, fold_norms, fold_structure
from medlite.compression.order import Stage
from medlite.errors import MedliteError
from medlite.export.trace import deployable
from medlite.types import CompressionContext, DataSpec

Layer = _ConvNd | nn.Linear

NUM_NAMES = 3
"""names of layers that a report gives as examples"""


@dataclass(frozen=True, kw_only=True)
class Fuse:
    """Computes the same with fewer layers, as a net is deployed; nothing is trained.

    First the parallel branches of re-parameterisable blocks are merged by the net's own `deploy()`
    (Ding et al., "RepVGG", arXiv:2101.03697, section 3.3; Vasu et al., "MobileOne",
    arXiv:2206.04040), then each batch normalisation behind a convolution, transposed convolution
    or linear layer is folded into it (Jacob et al., arXiv:1712.05877, section 3.2). Which layer a
    normalisation follows is read from the exported graph, in two and three dimensions. Those that
    follow none (pre-activation), or a layer that something else reads too, stay.

    The fused net can be pruned, trained and quantised further, but neither branches nor batch
    normalisation come back: what trains it should have a low learning rate, and what compares
    channels by their weights sees the normalisation's scale in them. Quantisation folds by itself;
    a step between the two is what needs this one.

    Args:
        num_checked_images: training images on which the fused net is held against the given one.
        tolerance: largest difference of the logits that passes, as a share of the largest logit;
            rounding in float32 makes some 1e-6.
    """

    stage: ClassVar[Stage] = "structure"

    num_checked_images: int = 16
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        samples, tolerance = self.num_checked_images, self.tolerance
        check_options(
            [
                ("num_checked_images", samples, samples >= 1, "a whole number from 1 up"),
                ("tolerance", tolerance, 0 < tolerance < 1, "in (0, 1)"),
            ]
        )

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the fused net and what was fused; `net` stays as it is.

        Raises:
            MedliteError: there is nothing to fuse, or the fused net computes something else.
            ExportError: torch cannot export the net.
        """
        original = evaluation_copy(net)
        merged = _merge(original)
        fused = evaluation_copy(merged)
        folds, kept = find_folds(fused, context.spec.input_shape)
        if not folds and merged is original:
            why = "no batch normalisation"
            if kept:
                why = f"none of its batch normalisations can be folded: {_in_words(kept)}"
            message = (
                f"nothing could be fused in {type(net).__name__}: it has no branches to merge and "
                f"{why}; leave the step 'fuse' out"
            )
            raise MedliteError(message)
        fold_norms(fused, folds)
        images = context.calibration_images(self.num_checked_images)
        if merged is not original:
            self._check(original, merged, images, {name for name, _ in merged.named_modules()})
        self._check(merged, fused, images, _places_to_compare(fused, folds))
        difference = relative_difference(original, fused, images)
        context.report(
            "fusion",
            f"{_describe_merging(original, merged)}; {len(folds)} of "
            f"{len(folds) + len(kept)} batch normalisations folded into the layer before; from "
            f"{_num_parameters(original):,} to {_num_parameters(fused):,} parameters; largest "
            f"difference of the logits {difference:.1e} of the largest ({len(images)} training "
            "images)",
        )
        context.report("not fused", _in_words(kept) or "nothing")
        return fused, {"is_merged": merged is not original, "folds": folds}

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Give a copy of `net` the fused modules; its weights are still to be loaded."""
        original = evaluation_copy(net)
        fused = _merge(original) if state["is_merged"] else original
        fold_structure(fused, state["folds"])
        return fused

    def _check(
        self, before: nn.Module, after: nn.Module, images: Tensor, places: Collection[str]
    ) -> None:
        """Hold one form against the next; the modules at `places` should give the same in both."""
        difference = relative_difference(before, after, images)
        if difference <= self.tolerance:
            return
        place = first_difference(before, after, images, places=places, tolerance=self.tolerance)
        message = (
            f"fusion changes what {type(before).__name__} computes: the logits differ by "
            f"{difference:.1e} of the largest, which is over tolerance={self.tolerance:g}, and the "
            f"first to differ is {place}; leave the step 'fuse' out, or raise the tolerance if the "
            "difference is one of rounding"
        )
        raise MedliteError(message)


def _places_to_compare(fused: nn.Module, folds: Mapping[str, str]) -> set[str]:
    """Where the folded normalisations were, and the layers that nothing was folded into."""
    layers = {
        name
        for name, module in fused.named_modules()
        if not list(module.children()) and list(module.parameters())
    }
    return layers - set(folds.values()) | set(folds)


def _merge(net: nn.Module) -> nn.Module:
    """A copy of the net with merged branches, or the net itself where it has none."""
    merged = deployable(net)
    if _shapes(merged) == _shapes(net):
        return net
    # timm freezes what lies beside the branches of a block that it merges (squeeze and excitation)
    freeze_like(merged, net)
    # some blocks of timm fail when they are merged again, which exports and quantisation would do
    vars(merged)["deploy"] = None
    return merged


def _shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def _describe_merging(original: nn.Module, merged: nn.Module) -> str:
    """What merging made of the layers and of the normalisations within the branches."""
    if merged is original:
        return "no branches to merge"
    layers, norms = (
        [_count(net, kind) for net in (original, merged)] for kind in (Layer, _BatchNorm)
    )
    return (
        f"branches merged: {layers[0]} convolutions and linear layers became {layers[1]}, and "
        f"{norms[0] - norms[1]} batch normalisations went with them"
    )


def _count(net: nn.Module, kind: Any) -> int:
    return sum(isinstance(module, kind) for module in net.modules())


def _num_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _in_words(kept: Mapping[str, str]) -> str:
    """The normalisations that stay, by reason, with a few names of each.

    >>> _in_words({"a": "used more than once", "b.norm": "used more than once"})
    '2 used more than once (a, b.norm)'
    """
    reasons = dict[str, list[str]]()
    for name, reason in kept.items():
        reasons.setdefault(reason, []).append(name)
    return "; ".join(
        f"{len(names)} {reason} ({', '.join(names[:NUM_NAMES])}"
        f"{', ...' if len(names) > NUM_NAMES else ''})"
        for reason, names in reasons.items()
    )
