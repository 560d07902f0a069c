"""Several teachers that speak as one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from medlite.types import Labels


class Ensemble(nn.Module):
    """The mean of the members' probabilities, as logits.

    Hinton et al., arXiv:1503.02531, section 1, name the arithmetic mean of an ensemble's
    predictions as soft targets. The probabilities are those at `temperature`, and so are the
    logits that give their mean: divided by it they give the mean again.

    Args:
        members: nets whose logits have equal shapes; the first one's feature maps stand for all.
        labels: "multiclass" takes the mean of softmax distributions, otherwise of sigmoids.
        temperature: T of the softening; 1 is what the members say of themselves.
    """

    def __init__(
        self, members: Iterable[nn.Module], *, labels: Labels, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.labels = labels
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W[, D]) -> logits (B, K[, H, W, D])."""
        said = torch.stack([member(images).float() / self.temperature for member in self.members])
        count = torch.tensor(float(len(said))).log()
        if self.labels == "multiclass":
            return self.temperature * (said.log_softmax(2).logsumexp(0) - count)
        present = nn.functional.logsigmoid(said).logsumexp(0)
        absent = nn.functional.logsigmoid(-said).logsumexp(0)
        return self.temperature * (present - absent)

    def at(self, temperature: float) -> Ensemble:
        """The same members, softened by `temperature`."""
        return Ensemble(self.members, labels=self.labels, temperature=temperature)
