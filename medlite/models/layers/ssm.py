"""Which state-space recurrence a model's token mixers use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medlite.errors import ConfigError, did_you_mean

KINDS = ("s6", "ssd")


@dataclass(frozen=True, kw_only=True)
class Ssm:
    """The options of a state-space layer, the same for all layers of a model.

    Args:
        kind: "s6", the selective scan of Mamba: every channel and state decays at its own rate
            (Gu and Dao, arXiv 2312.00752); or "ssd", that of Mamba-2: one rate a head, so that
            it can be computed by matrix products (Dao and Gu, arXiv 2405.21060).
        d_state: N, states of each channel.
        head_dim: channels of a head, for "ssd" only; a layer whose channels it does not divide
            takes its largest divisor up to that.
    """

    kind: Literal["s6", "ssd"] = "s6"
    d_state: int = 16
    head_dim: int = 32

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in KINDS:
            problems.append(
                f"model.ssm.kind: {self.kind!r} is none, {did_you_mean(self.kind, KINDS)}"
            )
        problems += [
            f"model.ssm.{name}: {value} is not a whole number from 1 up"
            for name, value in (("d_state", self.d_state), ("head_dim", self.head_dim))
            if value < 1
        ]
        if problems:
            raise ConfigError(problems)

    def num_heads(self, channels: int) -> int:
        """Heads of a layer with so many (inner) channels."""
        head_dim = min(self.head_dim, channels)
        return next(channels // d for d in range(head_dim, 0, -1) if channels % d == 0)


S6 = Ssm()
"""The published recurrence of Mamba, 16 states."""
