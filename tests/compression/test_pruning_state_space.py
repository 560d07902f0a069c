"""Pruning of every state-space model, with the scans of Mamba and of Mamba-2."""

import copy
from dataclasses import dataclass

import pytest
import torch
from test_pruning import saved_and_loaded
from torch import nn
from toy_world import make_batch, make_spec, task_loss

from medlite.compression.channel_groups import ChannelGroup, find_groups
from medlite.compression.channel_removal import remove_units
from medlite.compression.channel_trace import label_channels, named_weights
from medlite.compression.structure import record_structure, restore_structure
from medlite.export.trace import trace
from medlite.models.layers.ssm import Ssm
from medlite.models.lightm_unet import LightMUNet
from medlite.models.medmamba import MedMamba
from medlite.models.ultralight_vm_unet import UltraLightVMUNet
from medlite.models.vm_unet import VMUNet
from medlite.models.vmamba import VMamba
from medlite.types import DataSpec

MODELS = {
    "ultralight_vm_unet": (UltraLightVMUNet, {"widths": (4, 8, 16, 16, 24, 32)}, (32, 32)),
    "lightm_unet": (LightMUNet, {"init_filters": 16, "blocks_down": (1, 1)}, (8, 8)),
    "lightm_unet_3d": (
        LightMUNet, {"init_filters": 16, "blocks_down": (1, 1), "spatial_dims": 3}, (4, 4, 4)
    ),
    "vm_unet": (VMUNet, {"width": 16, "depths": (1, 1), "depths_decoder": (1, 1)}, (16, 16)),
    "vmamba": (VMamba, {"width": 16, "depths": (1, 1)}, (16, 16)),
    "medmamba": (MedMamba, {"width": 16, "depths": (1, 1)}, (24, 24)),
    "medmamba_lite": (
        MedMamba,
        {"width": 16, "depths": (1, 1), "separable_conv": True, "shared_scan": True},
        (24, 24),
    ),
}  # fmt: skip

FAST = {
    ("ultralight_vm_unet", "s6"), ("lightm_unet", "s6"), ("lightm_unet_3d", "ssd"),
    ("vm_unet", "s6"), ("vmamba", "ssd"), ("medmamba", "s6"), ("medmamba_lite", "ssd"),
}  # fmt: skip
"""Every model once, and every layer with both scans."""

CASES = [
    pytest.param(
        (name, kind), id=f"{name}-{kind}", marks=[pytest.mark.slow] * ((name, kind) not in FAST)
    )
    for name in MODELS
    for kind in ("s6", "ssd")
]


class Affine(nn.Module):
    """A normalisation without its statistics, which every channel has a part in."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.is_image = isinstance(norm, nn.GroupNorm)

    def forward(self, features):
        last = features.movedim(1, -1) if self.is_image else features
        scaled = last * self.weight + self.bias
        return scaled.movedim(-1, 1) if self.is_image else scaled


@dataclass
class Case:
    """A net, the same with every other unit of every group zero, and what is left of that."""

    name: str
    spec: DataSpec
    ssm: Ssm
    whole: nn.Module
    groups: list[ChannelGroup]
    half_zero: nn.Module
    pruned: nn.Module


def build(name, spec, ssm):
    model, options, _ = MODELS[name]
    return model(in_channels=1, num_classes=spec.num_classes, ssm=ssm, **options).eval()


@pytest.fixture(scope="module", params=CASES)
def case(request):
    name, kind = request.param
    model, _, image_size = MODELS[name]
    is_classifier = "classification" in model.tasks
    task = ("classification", "multiclass") if is_classifier else ("segmentation", "binary")
    spec = make_spec(*task, image_size=image_size, num_classes=3 if is_classifier else 1)
    ssm = Ssm(kind=kind, d_state=4, head_dim=4)
    torch.manual_seed(0)
    net = build(name, spec, ssm)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if name == "ultralight_vm_unet":
            net.channel_bridge.conv.weight[..., [0, 2]] = 0.0  # it blends neighbouring channels
    images = make_batch(spec, 2).image
    classes = label_channels(net, images)
    groups = find_groups(classes)
    half_zero = copy.deepcopy(net)
    for group in groups:
        move_units(half_zero, group, zero_odd_units)
    plans = [(group, list(range(1, group.num_units, 2))) for group in groups]
    pruned, done = remove_units(half_zero, images, classes, plans)
    assert len(done) == len(groups)
    return Case(name, spec, ssm, net, groups, half_zero, pruned)


@torch.no_grad()
def move_units(net, group, move):
    """Apply `move` to the units (U, M, ...) of each member of a group."""
    weights = dict(named_weights(net))
    for member in group.members:
        channels = weights[member.name].movedim(member.axis, 0)
        channels[member.indices] = move(channels[member.indices])


def zero_odd_units(units):
    return torch.where(is_odd(units), 0.0, units)


def is_odd(units):
    return (torch.arange(len(units)) % 2 == 1).view(-1, *[1] * (units.ndim - 1))


def without_statistics(net):
    """A copy in which nothing but the channels' own weights tells how many there are."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm | nn.GroupNorm):
                setattr(module, name, Affine(child))
    if isinstance(net, UltraLightVMUNet):
        net.spatial_bridge = nn.Identity()
    return net


def test_all_cases_are_there():
    assert len(CASES) == 14


def test_units_of_a_group_are_interchangeable(case):
    image = make_batch(case.spec, 2).image
    logits = case.whole(image)
    assert len(case.groups) >= 8
    for group in case.groups:
        permuted = copy.deepcopy(case.whole)
        move_units(permuted, group, lambda units: units.roll(1, 0))
        assert torch.allclose(permuted(image), logits, atol=1e-5), group.members


def test_residual_and_inner_channels_are_halved(case):
    before, after = dict(case.whole.named_parameters()), dict(case.pruned.named_parameters())
    projections = [name for name in before if name.endswith(("in_proj.weight", "out_proj.weight"))]
    assert len(projections) >= 4
    for name in projections:
        rows, columns = before[name].shape
        assert after[name].shape == (rows // 2, columns // 2), name


def test_scans_keep_their_states_and_heads(case):
    before, after = dict(case.whole.named_parameters()), dict(case.pruned.named_parameters())
    rates = [name for name in before if name.endswith(("A_log", "A_logs"))]
    assert len(rates) >= 2
    for name in rates:
        channels, *states = before[name].shape
        kept = (channels // 2, *states) if case.ssm.kind == "s6" else (channels, *states)
        assert after[name].shape == kept


def test_units_without_weight_are_removed_without_effect(case):
    image = make_batch(case.spec, 2).image
    whole, pruned = (without_statistics(net)(image) for net in (case.half_zero, case.pruned))
    assert torch.allclose(pruned, whole, atol=1e-5, rtol=1e-5)


def test_pruned_net_learns(case):
    net = copy.deepcopy(case.pruned).train()
    batch = make_batch(case.spec, 2)
    task_loss(case.spec, net(batch.image), batch).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_pruned_net_is_restored_and_exported_exactly(case):
    structure = record_structure(case.whole, case.pruned)
    structure, weights = saved_and_loaded((structure, case.pruned.state_dict()))
    restored = build(case.name, case.spec, case.ssm)
    restore_structure(restored, structure)
    restored.load_state_dict(weights, strict=True)
    image = make_batch(case.spec, 3).image
    assert torch.equal(restored(image), case.pruned(image))
    exported = trace(restored, case.spec.input_shape).module()
    assert torch.allclose(exported(image), case.pruned(image), atol=1e-5)
