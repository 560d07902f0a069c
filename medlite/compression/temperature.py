"""Temperature scaling: logits divided by one number, so that confidence matches accuracy."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.fx import GraphModule

from medlite.compression.copies import evaluation_copy
from medlite.compression.order import Stage
from medlite.export.trace import deployable
from medlite.metrics import calibration
from medlite.metrics.decisions import decisions

if TYPE_CHECKING:
    from medlite.types import Batch, CompressionContext, DataSpec, Labels, Task

LARGEST = 20.0
"""of the temperature; the least is 1 / LARGEST"""

NEAR = 0.01
"""of the end of the range, as a share: what is called its end"""

ALL_BATCHES = 1_000_000
"""more than any validation split has"""

MAX_PIXELS = 2_000_000
"""of masks, drawn from the validation images: more would not move one number"""

SEED = 0
"""of the draw"""


@dataclass(frozen=True, kw_only=True)
class TemperatureScaling:
    """Divides the logits by the temperature that fits the validation images best; the last step.

    Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 4.2: one
    number minimises the negative log likelihood, of binary and multi-label logits as of
    multi-class ones, and of masks over pixels. No decision changes, no order of patients by the
    probability of a binary or multi-label class does; the division goes into the exported file.
    What it mends is confidence: it cannot bring back a class that was lost. Where no decision on
    the validation images is wrong, no temperature fits: the logits stay as they are.
    """

    stage: ClassVar[Stage] = "calibrate"

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the net with a division behind it; `net` stays as it is."""
        spec = context.spec
        if context.is_dry:
            context.report("temperature", "one division of the logits, fitted on validation images")
            return scale_logits(net, 1.0), {"temperature": 1.0}
        logits, target = _validation_logits(net, context.validation_batches(ALL_BATCHES), spec.task)
        temperature = 1.0
        if not _is_faultless(logits, target, spec.labels):
            temperature = fit_temperature(logits, target, labels=spec.labels)
        context.report("temperature", _describe(logits, target, temperature, spec))
        return scale_logits(net, temperature), {"temperature": temperature}

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Put the division behind `net`; its weights are still to be loaded."""
        return scale_logits(net, state["temperature"])


class ScaledLogits(nn.Module):
    """A net and the division behind it.

    Args:
        net: gives (B, K, ...) logits.
        temperature: above 1 makes it less confident, below 1 more.
    """

    temperature: Tensor

    def __init__(self, net: nn.Module, temperature: float) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("temperature", torch.tensor(temperature))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W[, D]) -> (B, K, ...)."""
        return self.net(images) / self.temperature

    def deploy(self) -> ScaledLogits:
        """The same around the deployed form of the net."""
        return ScaledLogits(deployable(self.net), float(self.temperature)).eval()


def scale_logits(net: nn.Module, temperature: float) -> nn.Module:
    """A copy of `net` that divides its logits; a fixed graph gets the division as a node."""
    if not isinstance(net, GraphModule):
        return ScaledLogits(evaluation_copy(net), temperature).eval()
    scaled = copy.deepcopy(net).cpu()
    scaled.register_buffer("temperature", torch.tensor(temperature))
    (output,) = scaled.graph.find_nodes(op="output")
    (logits,) = output.all_input_nodes
    with scaled.graph.inserting_before(output):
        divisor = scaled.graph.get_attr("temperature")
        quotient = scaled.graph.call_function(torch.ops.aten.div.Tensor, (logits, divisor))
    quotient.meta = dict(logits.meta)
    output.replace_input_with(logits, quotient)
    scaled.recompile()
    return scaled


def fit_temperature(logits: Tensor, target: Tensor, *, labels: Labels) -> float:
    """The temperature of least negative log likelihood, within 1 / LARGEST and LARGEST.

    The likelihood is concave in 1 / temperature, so there is one best value. It lies at an end
    of the range where every decision is right, or where the logits say nothing.

    Args:
        logits: (N, K, ...) of validation images.
        target: their classes or masks.
        labels: what the logits mean.
    """
    logits = logits.double()
    bound = math.log(LARGEST)
    found = minimize_scalar(
        lambda log_temperature: _mean_loss(logits, target, math.exp(log_temperature), labels),
        bounds=(-bound, bound),
        method="bounded",
    )
    return math.exp(found.x)


@torch.no_grad()
def _validation_logits(
    net: nn.Module, batches: Sequence[Batch], task: Task
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and targets (N,) or (N, K) of images, or of pixels drawn from all of them.

    They are drawn at random: every n-th pixel of a volume would be one of few slices wherever n
    and the number of slices have a common factor.
    """
    logits = [net(batch.image).float() for batch in batches]
    targets = [batch.target for batch in batches]
    if task == "classification":
        return torch.cat(logits), torch.cat(targets)
    share = MAX_PIXELS / sum(target.numel() for target in targets)
    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.rand(target.numel(), generator=generator) < share for target in targets]
    of_pixels = (each.movedim(1, -1).flatten(0, -2) for each in logits)
    return (
        torch.cat([pixels[which] for pixels, which in zip(of_pixels, drawn, strict=True)]),
        torch.cat([each.flatten()[which] for each, which in zip(targets, drawn, strict=True)]),
    )


def _is_faultless(logits: Tensor, target: Tensor, labels: Labels) -> bool:
    return torch.equal(decisions(logits, labels), target.long())


def _mean_loss(logits: Tensor, target: Tensor, temperature: float, labels: Labels) -> float:
    """Mean negative log likelihood of logits divided by `temperature`."""
    scaled = logits / temperature
    return float(calibration.negative_log_likelihood(scaled, target, labels=labels).mean())


def _describe(logits: Tensor, target: Tensor, temperature: float, spec: DataSpec) -> str:
    before, after = (
        _mean_loss(logits.double(), target, divisor, spec.labels) for divisor in (1.0, temperature)
    )
    what = "images" if spec.task == "classification" else "pixels"
    where = f"{len(logits):,} validation {what}"
    if _is_faultless(logits, target, spec.labels):
        return (
            f"1, as no decision on {where} is wrong: any smaller temperature would fit better, and "
            f"how confident to be cannot be read from them; NLL {before:.4f}"
        )
    found = f"{temperature:.3f}; NLL on {where} {before:.4f} -> {after:.4f}"
    if abs(math.log(temperature)) > math.log(LARGEST) - NEAR:
        end = LARGEST if temperature > 1 else 1 / LARGEST
        found += (
            f"; THIS IS THE END OF THE RANGE, {end:g}: no temperature within it makes these logits "
            "fit; look at what the net gives for validation images before you trust a probability"
        )
    return found
