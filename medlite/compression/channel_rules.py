"""What each operator does to the labels of channels: the table of rules.

An elementwise operator is known by torch's own tag. An operator without a rule keeps all channels
that it reads, so that nothing is ever pruned by mistake, only not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from medlite.compression import channel_moves as moves
from medlite.compression import channel_products as products
from medlite.compression.channel_calls import Call, join, keep_all
from medlite.compression.channel_labels import Labels

_BY_RULE: dict[Callable[[Call], Labels | list[Labels]], str] = {
    join: (
        "alias clone contiguous detach dropout hardswish layer_norm log_sigmoid log_softmax "
        "rms_norm softmax to _to_copy"
    ),
    moves.view: (
        "broadcast_to expand mT matrix_H movedim numpy_T permute split_with_sizes squeeze t "
        "transpose unsqueeze"
    ),
    moves.reshape: "flatten reshape unflatten view _unsafe_view",
    moves.split: "chunk split",
    moves.cut: "narrow select slice unbind",
    moves.flip: "flip",
    moves.roll: "roll",
    moves.pad: "constant_pad_nd pad",
    moves.concatenate: "cat concat stack",
    moves.look_up: "embedding",
    moves.reduce: "amax amin max mean min sum",
    moves.resample: (
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d "
        "adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d "
        "upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d "
        "upsample_nearest2d upsample_nearest3d upsample_trilinear3d"
    ),
    products.convolve: "conv1d conv2d conv3d",
    products.convolve_transposed: "conv_transpose1d conv_transpose2d conv_transpose3d",
    products.normalise_channels: "batch_norm instance_norm prelu",
    products.normalise_groups: "group_norm",
    products.linear: "linear",
    products.matmul: "bmm matmul mm",
    products.einsum: "einsum",
    products.attend: "scaled_dot_product_attention",
    products.scan: " ".join(products.SCANS),
}
"""rule -> names of operators, without overload and without the "_" of those that work in place"""

_RULES = {name: rule for rule, names in _BY_RULE.items() for name in names.split()}


def follow(call: Call) -> Labels | list[Labels]:
    """The labels of what an operator gives."""
    namespace, name = call.operator._schema.name.split("::")
    name = name.removesuffix("_") if namespace == "aten" else f"{namespace}::{name}"
    if name in _RULES:
        return _RULES[name](call)
    return join(call) if _is_elementwise(call.operator) else keep_all(call)


def _is_elementwise(operator: Any) -> bool:
    """By torch's tag, which operators that work in place share with those that do not."""
    namespace, name = operator._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = getattr(packet, operator._overloadname, operator)
    return torch.Tag.pointwise in overload.tags
