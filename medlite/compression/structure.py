"""The shape of a net that lost channels, as plain values that rebuild it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def record_structure(original: nn.Module, changed: nn.Module) -> dict[str, Any]:
    """What `changed` has other than `original`, a net of the same modules.

    Returns:
        "shapes": the shape of every tensor of the state whose size differs, by name;
        "attributes": for every module, the whole numbers (or tuples of them) that differ,
        such as `out_channels`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in original.state_dict().items()}
    attributes = {
        name: _changed_numbers(original.get_submodule(name), module)
        for name, module in changed.named_modules()
    }
    return {
        "shapes": {
            name: list(tensor.shape)
            for name, tensor in changed.state_dict().items()
            if tuple(tensor.shape) != shapes[name]
        },
        "attributes": {name: numbers for name, numbers in attributes.items() if numbers},
    }


def restore_structure(net: nn.Module, structure: dict[str, Any]) -> None:
    """Give `net`, built like the original, the recorded shapes; their values become zero."""
    # By identity, which holds as long as the old tensors are kept.
    resized: dict[int, tuple[Tensor, Tensor]] = {}
    for name, shape in structure["shapes"].items():
        owner_name, _, leaf = name.rpartition(".")
        owner = net.get_submodule(owner_name)
        old = getattr(owner, leaf)
        # Two names of one tensor stay one tensor, and so do those of one module.
        if not any(old is new for _, new in resized.values()):
            setattr(owner, leaf, resized.setdefault(id(old), (old, _zeros(old, shape)))[1])
    for name, numbers in structure["attributes"].items():
        vars(net.get_submodule(name)).update(
            {key: tuple(v) if isinstance(v, list) else v for key, v in numbers.items()}
        )


def _changed_numbers(original: nn.Module, changed: nn.Module) -> dict[str, Any]:
    numbers = ((key, value) for key, value in vars(changed).items() if _is_number(value))
    return {key: value for key, value in numbers if vars(original).get(key) != value}


def _is_number(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(_is_number(item) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _zeros(old: Tensor, shape: list[int]) -> Tensor:
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
