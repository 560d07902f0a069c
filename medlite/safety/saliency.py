"""Which pixels a decision rests on, by four methods.

A map explains one score: a weighted sum of logits, the same one for every model that is compared.

Shapes: C channels, H W D height width depth, K logits, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from medlite.errors import ConfigError, did_you_mean
from medlite.metrics.decisions import decisions
from medlite.safety.saliency_graph import TAP, attention_maps, tap_feature_map

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from medlite.safety_settings import ExplainabilitySettings
    from medlite.types import DataSpec

STEPS = 16
"""points on the path of integrated gradients"""

WINDOWS = {2: 8, 3: 4}
"""windows along each side that are occluded in turn, of images and of volumes"""

AT_ONCE = 16
"""occluded images that a model is asked about in one batch"""

METHODS = ("occlusion", "integrated_gradients", "grad_cam", "rollout")

Score = Callable[["Tensor"], "Tensor"]
"""images (B, C, H, W[, D]) -> (B,)"""


def check_explainability(settings: ExplainabilitySettings) -> None:
    """Refuse methods that do not exist.

    Raises:
        ConfigError: with every problem.
    """
    named = settings.methods
    if not isinstance(named, list):
        problems = [] if named == "auto" else [
            f"explainability.methods: {named!r} is neither auto nor a list such as [occlusion]"
        ]  # fmt: skip
    else:
        problems = [
            f"explainability.methods: {name!r}, {did_you_mean(name, METHODS)}"
            for name in named
            if name not in METHODS
        ]
        if not named:
            problems.append("explainability: nothing to do; say explainability.enabled=false")
    if problems:
        raise ConfigError(problems)


def methods_of(settings: ExplainabilitySettings) -> tuple[str, ...]:
    """The methods to try."""
    return METHODS if settings.methods == "auto" else tuple(dict.fromkeys(settings.methods))


def score_weights(logits: Tensor, target: np.ndarray, spec: DataSpec) -> Tensor:
    """What is explained, as weights of the logits, (K, ...) like `logits`.

    Of a classifier the logit of the decided class (its negative for the first of two classes), of
    several labels that of the likeliest. Of a mask the mean logit of the decided foreground, each
    pixel by its own class; the annotated foreground where nothing is decided to be; all pixels
    where there is none either.

    Args:
        logits: (K, ...) of the uncompressed model.
        target: the truth of the image.
        spec: the dataset.
    """
    if spec.task == "classification":
        if spec.labels == "binary":
            return torch.where(logits > 0, 1.0, -1.0)
        return F.one_hot(logits.argmax(), len(logits)).float()
    decided = decisions(logits[None], spec.labels)[0]
    if not (decided > 0).any():
        decided = torch.from_numpy(np.asarray(target)).long()
    if not (decided > 0).any():
        decided = torch.ones_like(decided)
    num_classes = len(spec.class_names)
    of_classes = F.one_hot(decided, num_classes).movedim(-1, 0).float()
    of_classes[0] = 0
    kept = of_classes[1:] if spec.labels == "binary" else of_classes
    return kept / kept.sum()


def scored(answer: Callable[[Tensor], Tensor], weights: Tensor) -> Score:
    """The score of images by what a model answers."""
    return lambda images: (answer(images) * weights).flatten(1).sum(1)


def integrated_gradients(score: Score, image: Tensor) -> np.ndarray:
    """Gradients along the line from a black image, times the image; absolute, over channels.

    Sundararajan, Taly & Yan, "Axiomatic Attribution for Deep Networks", arXiv:1703.01365,
    equation 1. Black is what zero is after the preprocessing, the mean of most.

    Args:
        score: differentiable.
        image: (1, C, H, W[, D]).

    Returns:
        (H, W[, D]), at least 0.
    """
    from captum.attr import IntegratedGradients

    found = IntegratedGradients(score).attribute(image, n_steps=STEPS, internal_batch_size=STEPS)
    return found[0].abs().sum(0).detach().numpy()


def grad_cam(graph: GraphModule, weights: Tensor, image: Tensor) -> np.ndarray | None:
    """The deepest feature map, its channels weighted by their mean gradient; negative parts cut.

    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization", arXiv:1610.02391, equations 1 and 2; for masks as Vinogradova et al., "Towards
    Interpretable Semantic Segmentation via Gradient-weighted Class Activation Mapping",
    arXiv:2002.11434.

    Args:
        graph: of `as_graph`.
        weights: of `score_weights`.
        image: (1, C, H, W[, D]).

    Returns:
        (H, W[, D]) at the image's size, at least 0; None where the net has no such map.
    """
    from captum.attr import LayerGradCam

    tapped = tap_feature_map(graph, image)
    if tapped is None:
        return None
    method = LayerGradCam(scored(tapped, weights), tapped.get_submodule(TAP))
    coarse = method.attribute(image, relu_attributions=True).detach()
    return _resized(coarse, image)


def occlusion(score: Score, image: Tensor) -> np.ndarray:
    """By how much the score falls where a window of the image is replaced by its mean.

    Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", arXiv:1311.2901,
    section 4.2. It asks the model itself, in whatever runtime, and needs no gradients.

    Args:
        score: of any model.
        image: (1, C, H, W[, D]).

    Returns:
        (H, W[, D]), at least 0: rises of the score are cut.
    """
    from captum.attr import Occlusion

    sides = image.shape[2:]
    window = tuple(math.ceil(side / WINDOWS[len(sides)]) for side in sides)
    mean = image.mean(tuple(range(2, image.dim())), keepdim=True).expand_as(image)
    found = Occlusion(score).attribute(
        image,
        sliding_window_shapes=(image.shape[1], *window),
        strides=(image.shape[1], *window),
        baselines=mean,
        perturbations_per_eval=AT_ONCE,
    )
    return found[0].mean(0).clamp_min(0).detach().numpy()


def rollout(graph: GraphModule, image: Tensor) -> np.ndarray | None:
    """How much of each patch reaches the output token, by the product of all attentions.

    Abnar & Zuidema, "Quantifying Attention Flow in Transformers", arXiv:2005.00928, section 3: half
    of each layer is the residual. It does not know which class is explained. Tokens that are not
    of the square of patches come first; without such a token the mean over all rows is taken.

    Args:
        graph: of `as_graph`.
        image: (1, C, H, W).

    Returns:
        (H, W) at the image's size; None where not all layers attend to the same square of tokens.
    """
    maps = attention_maps(graph, image)
    if not maps or len({each.shape for each in maps}) > 1 or image.dim() != 4:
        return None
    num_tokens = len(maps[0])
    side = math.isqrt(num_tokens)
    num_first = num_tokens - side**2
    if side < 2 or num_first > MOST_FIRST_TOKENS:
        return None
    flow = rolled_out(maps)
    row = flow[0] if num_first else flow.mean(0)
    return _resized(row[num_first:].reshape(1, 1, side, side), image)


MOST_FIRST_TOKENS = 5
"""class, distillation and register tokens"""


def rolled_out(maps: Sequence[Tensor]) -> Tensor:
    """The product of attentions (T, T) with residuals, first layer first; rows sum to 1."""
    flow = torch.eye(len(maps[0]))
    for attention in maps:
        mixed = attention / 2 + torch.eye(len(attention)) / 2
        flow = mixed / mixed.sum(1, keepdim=True) @ flow
    return flow


def _resized(coarse: Tensor, image: Tensor) -> np.ndarray:
    mode = "bilinear" if image.dim() == 4 else "trilinear"
    fine = F.interpolate(coarse, image.shape[2:], mode=mode, align_corners=False)
    return fine[0, 0].numpy()
