"""Rules for operators with weights, for attention and for scans."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from medlite.compression.channel_calls import Call, keep_all
from medlite.compression.channel_labels import ChannelClasses, Labels
from medlite.compression.channel_moves import resample

SCANS = {
    "medlite::selective_scan": "bpld,bpld,pdn,bpln,bpln,pd",
    "medlite::ssd_scan": "bpld,bplh,ph,bpln,bpln,pd",
    "medlite::wavefront_scan": "bijd,bpijd,pdn,bpijn,bijn,d",
}
"""The axes of the operands of a scan: d channels, which it does not mix; h heads, equal parts of
them; and what stays: b samples, p sets of parameters, l tokens, i j pixels, n states."""


def linear(call: Call) -> Labels:
    """(..., C) by a weight (C', C)."""
    source, weight, bias, *_ = (*call.args, None)
    batch = range(len(source.shape) - 1)
    product = call.classes.contract(
        [(*batch, "in"), ("out", "in")], [source, weight], (*batch, "out"), call.shape
    )
    return _along(call, product, len(batch), [product.along.get(len(batch)), *_vector(bias)])


def matmul(call: Call) -> Labels | list[Labels]:
    """(..., X, Y) by (..., Y, Z)."""
    left, right = call.args
    if min(len(left.shape), len(right.shape)) < 2:
        return keep_all(call)
    terms = [(*_batch(left), "x", "y"), (*_batch(right), "y", "z")]
    result = (*range(2 - len(call.shape), 0), "x", "z")
    return call.classes.contract(terms, [left, right], result, call.shape)


def einsum(call: Call) -> Labels | list[Labels]:
    """Any product of tensors that is written out, without repeated letters in a factor."""
    terms, _, result = call.args[0].replace(" ", "").partition("->")
    factors = terms.split(",")
    if "." in terms or not result or any(len(set(factor)) < len(factor) for factor in factors):
        return keep_all(call)
    return call.classes.contract(factors, call.args[1], result, call.shape)


def attend(call: Call) -> Labels:
    """Scaled dot-product attention: only the channels of the values can go.

    The number of those of queries and keys scales the scores.
    """
    value: Labels = call.args[2]
    others = [operand for operand in call.operands if operand is not value]
    for labels in (labels for operand in others for labels in operand.along.values()):
        call.classes.fix(labels)
    last = len(value.shape) - 1
    for axis in set(value.along) - {last}:
        call.classes.fix(value.along[axis])
    return Labels(call.shape, {last: value.along[last]} if last in value.along else {})


def convolve(call: Call) -> Labels:
    """(B, C, ...) by a weight (C', C / groups, ...)."""
    image, weight, bias, *_ = (*call.args, None)
    classes, groups = call.classes, call.argument(6, "groups", 1)
    entering, leaving = image.along.get(1), weight.along.get(0)
    if groups > 1 and weight.shape[1] == 1:
        return _convolved(
            call, weight, [_repeat(entering, weight.shape[0]), leaving, *_vector(bias)]
        )
    _repeat_in_groups(classes, entering, groups)
    _repeat_in_groups(classes, leaving, groups)
    of_a_group = None if entering is None else entering[: weight.shape[1]]
    classes.meet((weight.shape[1], labels) for labels in (of_a_group, weight.along.get(1)))
    return _convolved(call, weight, [leaving, *_vector(bias)])


def convolve_transposed(call: Call) -> Labels | list[Labels]:
    """(B, C, ...) by a weight (C, C', ...); in groups, all channels stay."""
    if call.argument(6, "groups", 1) > 1:
        return keep_all(call)
    image, weight, bias, *_ = (*call.args, None)
    call.classes.meet(
        (weight.shape[0], labels.along.get(axis)) for labels, axis in ((image, 1), (weight, 0))
    )
    return _convolved(call, weight, [weight.along.get(1), *_vector(bias)])


def normalise_channels(call: Call) -> Labels:
    """Batch and instance normalisation, PReLU: vectors for the channels of (B, C, ...)."""
    image, *vectors = call.operands
    return _along(call, image, 1, [image.along.get(1), *itertools.chain(*map(_vector, vectors))])


def normalise_groups(call: Call) -> Labels:
    """Group normalisation: equal groups of channels lose the same places."""
    normalised = normalise_channels(call)
    _repeat_in_groups(call.classes, normalised.along.get(1), call.args[1])
    return normalised


def scan(call: Call) -> Labels:
    """One of `SCANS`, by its channels; equal heads lose the same places."""
    classes, terms = call.classes, SCANS[call.operator._schema.name].split(",")
    channels, num_heads = [], 1
    for operand, term in zip(call.args, terms, strict=True):
        for axis, letter in enumerate(term):
            if letter == "d":
                channels.append((operand.shape[axis], operand.along.get(axis)))
            else:
                classes.fix(operand.along.get(axis))
            num_heads = operand.shape[axis] if letter == "h" else num_heads
    labels = classes.meet(channels)
    _repeat_in_groups(classes, labels, num_heads)
    return Labels(call.shape, {} if labels is None else {len(call.shape) - 1: labels})


def _convolved(call: Call, weight: Labels, channels: Sequence[Tensor | None]) -> Labels:
    """Channels that meet along axis 1 of the result; the size of the kernel must stay."""
    for axis in range(2, len(weight.shape)):
        call.classes.fix(weight.along.get(axis))
    return _along(call, resample(call), 1, channels)


def _along(call: Call, labels: Labels, axis: int, channels: Sequence[Tensor | None]) -> Labels:
    """Labels with others, which meet, along one axis of a call's result."""
    met = call.classes.meet((call.shape[axis], one) for one in channels)
    along = {other: one for other, one in labels.along.items() if other != axis}
    return Labels(call.shape, along if met is None else along | {axis: met})


def _vector(labels: Labels | None) -> list[Tensor | None]:
    """What is along a vector, if it is there and has more than one entry for all."""
    return [] if labels is None or labels.shape == (1,) else [labels.along.get(0)]


def _repeat(labels: Tensor | None, size: int) -> Tensor | None:
    return None if labels is None else labels.repeat_interleave(size // len(labels))


def _repeat_in_groups(classes: ChannelClasses, labels: Tensor | None, num_groups: int) -> None:
    """Groups of channels, one after another, lose the same places."""
    if labels is not None and num_groups > 1:
        classes.unite_rows(labels.view(num_groups, -1))


def _batch(labels: Labels) -> range:
    """What the leading axes of matrices are called: by their distance from the rows."""
    return range(2 - len(labels.shape), 0)
