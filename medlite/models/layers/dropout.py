"""Dropout that does nothing, taken out of networks of other libraries."""

from __future__ import annotations

from torch import nn

KINDS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


class IdleDropout(nn.Identity):
    """The identity, with the probability that some networks read from their dropout."""

    p = 0.0


def drop_idle_dropout(net: nn.Module) -> None:
    """Replace, in place, dropout of probability 0 by the identity.

    An idle dropout is still a node of an exported graph, and torchao's switch between training
    and evaluation gives such nodes a probability of its own (pytorch/ao issue 4107).
    """
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, KINDS) and child.p == 0:
                setattr(module, name, IdleDropout())
