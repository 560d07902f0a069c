"""Rules for operators with weights, for attention and for scans."""

from __future__ import annotations

import string

from torch import Tensor

from medlite.compression.channel_calls import Call, join_channel_weights, keep_all
from medlite.compression.channel_labels import ChannelClasses, Labels, varying_axes
from medlite.compression.channel_moves import resampled

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
    batch = _letters(len(source.shape) - 1)
    product = call.classes.einsum(f"{batch}Y,ZY->{batch}Z", [source, weight], call.shape)
    return call.classes.join([product, bias] if bias else [product], call.shape)


def matmul(call: Call) -> Labels | list[Labels]:
    """(..., X, Y) by (..., Y, Z)."""
    left, right = call.args
    if min(len(left.shape), len(right.shape)) < 2:
        return keep_all(call)
    batch = _letters(len(call.shape) - 2)
    first, second = (batch[len(call.shape) - len(term.shape) :] for term in (left, right))
    equation = f"{first}XY,{second}YZ->{batch}XZ"
    return call.classes.einsum(equation, [left, right], call.shape)


def einsum(call: Call) -> Labels | list[Labels]:
    """Any product of tensors that is written out, without repeated letters in a factor."""
    equation, operands = call.args[0].replace(" ", ""), call.args[1]
    factors = equation.split("->")[0].split(",")
    is_written_out = "->" in equation and "." not in equation
    if not is_written_out or any(len(set(factor)) < len(factor) for factor in factors):
        return keep_all(call)
    return call.classes.einsum(equation, operands, call.shape)


def attend(call: Call) -> Labels:
    """Scaled dot-product attention: queries (..., X, Y), keys (..., Z, Y), values (..., Z, V)."""
    query, key, value = call.args[:3]
    batch = _letters(len(call.shape) - 2)
    shape = (*query.shape[:-1], key.shape[-2])
    scores = call.classes.einsum(f"{batch}XY,{batch}ZY->{batch}XZ", [query, key], shape)
    return call.classes.einsum(f"{batch}XZ,{batch}ZV->{batch}XV", [scores, value], call.shape)


def convolve(call: Call) -> Labels:
    """(B, C, ...) by a weight (C', C / groups, ...)."""
    image, weight, bias, *_ = (*call.args, None)
    return _convolve(call, image, weight, bias, call.argument(6, "groups", 1))


def convolve_transposed(call: Call) -> Labels | list[Labels]:
    """(B, C, ...) by a weight (C, C', ...); in groups, all channels stay."""
    if call.argument(6, "groups", 1) > 1:
        return keep_all(call)
    image, weight, bias, *_ = (*call.args, None)
    shape = (weight.shape[1], weight.shape[0], *weight.shape[2:])
    swapped = Labels(shape, tuple(sheet.transpose(0, 1) for sheet in weight.sheets))
    return _convolve(call, image, swapped, bias, 1)


def normalise_channels(call: Call) -> Labels:
    """Batch and instance normalisation, PReLU: vectors for the channels of (B, C, ...)."""
    image, *weights = (arg for arg in call.args if isinstance(arg, Labels))
    return join_channel_weights(call, image, weights)


def normalise_groups(call: Call) -> Labels:
    """Group normalisation: equal groups of channels lose the same places."""
    normalised = normalise_channels(call)
    for sheet in normalised.sheets:
        if 1 in varying_axes(sheet):
            call.classes.unite_along(sheet.unflatten(1, (call.args[1], -1)), [1])
    return call.classes.tidy(call.shape, normalised.sheets)


def scan(call: Call) -> Labels:
    """One of `SCANS`, by its channels; equal heads lose the same places."""
    classes, terms = call.classes, SCANS[call.operator._schema.name].split(",")
    vectors, num_heads = [], 1
    for labels, term in zip(call.args, terms, strict=True):
        axis = term.find("d")
        classes.fix(*(sheet for sheet in labels.sheets if axis not in varying_axes(sheet)))
        if "h" in term:
            num_heads = labels.shape[term.index("h")]
        if axis >= 0:
            others = set(range(len(term))) - {axis}
            vectors.append(classes.drop(labels, others, labels.shape[axis : axis + 1]))
    channels = classes.join(vectors, call.shape[-1:])
    for sheet in channels.sheets:
        classes.unite_along(sheet.unflatten(0, (num_heads, -1)), [0] if num_heads > 1 else [])
    return classes.tidy(call.shape, [sheet.expand(call.shape) for sheet in channels.sheets])


def _convolve(
    call: Call, image: Labels, weight: Labels, bias: Labels | None, groups: int
) -> Labels:
    """The products of each group's channels, at one pixel, spread over all of them."""
    classes, (batch, rows, *grid) = call.classes, call.shape
    sheets = resampled(classes, image, (*image.shape[:2], *grid))
    pixel = [sheet.flatten(2)[..., 0] for sheet in sheets]
    channels = classes.tidy(image.shape[:2], pixel)
    factors = [_in_parts(channels, 1, groups), _in_parts(weight, 0, groups)]
    kernel = string.ascii_uppercase[: len(grid)]
    shape = (batch, groups, rows // groups)
    product = classes.einsum(f"bgi,goi{kernel}->bgo", factors, shape)
    made = _same_in_all_groups(classes, product) if weight.shape[1] > 1 else product.sheets
    flat = [sheet.reshape(batch, rows, *[1] * len(grid)) for sheet in made]
    positions = [sheet[:, :1] for sheet in sheets if min(varying_axes(sheet), default=0) > 1]
    spread = [sheet.expand(call.shape) for sheet in (*flat, *positions)]
    return join_channel_weights(call, classes.tidy(call.shape, spread), [bias])


def _same_in_all_groups(classes: ChannelClasses, product: Labels) -> tuple[Tensor, ...]:
    return tuple(classes.unite_along(sheet, {1} & varying_axes(sheet)) for sheet in product.sheets)


def _in_parts(labels: Labels, axis: int, parts: int) -> Labels:
    size = labels.shape[axis] // parts
    shape = (*labels.shape[:axis], parts, size, *labels.shape[axis + 1 :])
    return Labels(shape, tuple(sheet.unflatten(axis, (parts, size)) for sheet in labels.sheets))


def _letters(count: int) -> str:
    return string.ascii_lowercase[:count]
