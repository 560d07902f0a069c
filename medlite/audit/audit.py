"""Published claims beside what the networks of conf/model really are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from medlite.audit.claims import Claim
from medlite.audit.runs import find_evidence
from medlite.config import build, check_signature, locate, model_config
from medlite.errors import ConfigError
from medlite.export.layer_costs import LayerCost, count_layers, total

AGREES, DIFFERS, OPEN = "as claimed", "differs", "not checked"

TOLERANCE = 0.01
"""relative: papers cut digits off as often as they round"""


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One claim and what was measured of it."""

    model: str
    quantity: str
    """params | macs | latency | metric"""
    claimed: float
    measured: float | None
    """None where it cannot be checked here; `reason` says why"""
    unit: str
    input: str
    """what it was measured on, in words"""
    source: str
    reason: str
    verdict: str
    """as claimed (to the digits that were published, or to 1 %) | differs | not checked"""


class Audit:
    """Checks claims one by one; each form of each network is built and counted once.

    Args:
        directories: where conf/model is looked for.
        runs: directories with finished runs, in which claims of metrics are looked up.
    """

    def __init__(self, directories: Sequence[Path], runs: Sequence[Path] = ()) -> None:
        self.directories, self.runs = directories, runs
        self._counted: dict[str, LayerCost] = {}

    def check(self, claim: Claim) -> AuditRow:
        """Measure what can be measured of `claim`.

        Raises:
            ConfigError: the registry names a network that does not exist.
        """
        if claim.unavailable:
            return _row(claim, None, reason=claim.unavailable)
        if claim.quantity == "metric":
            return self._check_metric(claim)
        cost = self._count(claim)
        measured = cost.params if claim.quantity == "params" else cost.macs
        tolerance = max(claim.half_unit, TOLERANCE * claim.value)
        agrees = abs(measured - claim.value) <= tolerance * (1 + 1e-9)
        return _row(claim, measured, reason=claim.reason, agrees=agrees)

    def _check_metric(self, claim: Claim) -> AuditRow:
        evidence = find_evidence(claim, self.runs)
        if evidence is None:
            return _row(claim, None, reason=f"needs a run: {claim.reason}")
        return _row(claim, evidence.mean, reason=str(evidence), agrees=evidence.holds(claim.value))

    def _count(self, claim: Claim) -> LayerCost:
        key = repr((claim.model, claim.input, claim.num_classes, claim.overrides, claim.form))
        if key not in self._counted:
            net = build_claimed(claim, self.directories)
            counted = net if claim.form == "deployed" else AsTrained(net)
            self._counted[key] = total(count_layers(counted, claim.input))
        return self._counted[key]


class AsTrained(nn.Module):
    """Hides `deploy`, so that a network is counted with its branches apart."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """As the network itself."""
        return self.net(images)


def build_claimed(claim: Claim, directories: Iterable[Path]) -> nn.Module:
    """The network as the claim has it.

    Raises:
        ConfigError: there is no such model, or it does not take an override.
    """
    config = model_config(claim.model, directories) | dict(claim.overrides)
    problems = list(check_signature(claim.model, locate(config["_target_"]), config))
    if problems:
        raise ConfigError(problems)
    return build(
        config,
        in_channels=claim.input[0],
        num_classes=claim.num_classes,
        image_size=claim.input[1:],
        spatial_dims=len(claim.input) - 1,
    )


def _row(
    claim: Claim, measured: float | None, *, reason: str, agrees: bool | None = None
) -> AuditRow:
    channels, *sides = claim.input
    classes = f"{claim.num_classes} class{'es' * (claim.num_classes > 1)}"
    size = f"{channels}x{'x'.join(map(str, sides))}, {classes}"
    changed = "".join(f", {key} {value}" for key, value in claim.overrides.items())
    form = ", before merging" if claim.form == "training" else ""
    units = {"params": "parameters", "macs": "MACs", "metric": claim.metric}
    return AuditRow(
        model=claim.model,
        quantity=claim.quantity,
        claimed=claim.value,
        measured=measured,
        unit=units.get(claim.quantity, claim.unit),
        input=claim.dataset or f"{size}{changed}{form}",
        source=claim.source,
        reason=reason,
        verdict={None: OPEN, True: AGREES, False: DIFFERS}[agrees],
    )
