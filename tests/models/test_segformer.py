"""SegFormer against the published counts and its decoder written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ShapeError
from medlite.models.segformer import SegFormer, SegFormerHead

TINY = {"widths": (8, 16, 20, 16), "depths": (1, 1, 1, 1), "decoder_width": 8}


@pytest.mark.parametrize(("num_classes", "count"), [(1, 3_714_401), (150, 3_752_694)])
def test_parameters_are_those_of_the_published_code(num_classes, count):
    with torch.device("meta"):
        net = SegFormer(in_channels=3, num_classes=num_classes)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize(("side", "num_classes", "gmacs"), [(256, 1, 1.746), (512, 150, 8.388)])
def test_multiply_adds_are_those_of_the_published_code(side, num_classes, gmacs):
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        net = SegFormer(in_channels=3, num_classes=num_classes).eval()
        net(torch.empty(1, 3, side, side))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.001)


def test_head_joins_linear_maps_from_coarse_to_fine_and_fuses_them():
    torch.manual_seed(0)
    head = SegFormerHead((4, 6), 8, 3).eval()
    conv, norm, _ = head.fuse
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    fine, coarse = torch.randn(1, 4, 4, 6), torch.randn(1, 6, 2, 3)
    near, far = (
        torch.einsum("bchw,oc->bohw", scale, linear.weight) + linear.bias[:, None, None]
        for scale, linear in zip((fine, coarse), head.projections, strict=True)
    )
    far = F.interpolate(far, scale_factor=2, mode="bilinear", align_corners=False)
    weight = conv.weight[:, :, 0, 0]
    mixed = torch.einsum("bchw,oc->bohw", far, weight[:, :8])
    mixed = mixed + torch.einsum("bchw,oc->bohw", near, weight[:, 8:])
    scale = (norm.running_var + norm.eps).rsqrt()
    fused = F.relu((mixed - norm.running_mean[:, None, None]) * scale[:, None, None])
    expected = F.conv2d(fused, head.classifier.weight, head.classifier.bias)
    torch.testing.assert_close(head((fine, coarse)), expected)


def test_logits_are_those_of_a_quarter_of_the_size_interpolated():
    torch.manual_seed(0)
    net, images = SegFormer(in_channels=2, num_classes=3, **TINY).eval(), torch.randn(1, 2, 64, 32)
    small = net.head(net.encoder(images))
    assert small.shape == (1, 3, 16, 8)
    expected = F.interpolate(small, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(net(images), expected)


def test_fused_channels_drop_out_in_training_alone():
    torch.manual_seed(0)
    head, scales = SegFormerHead((4,), 64, 3), [torch.randn(1, 4, 4, 4)]
    head.fuse.eval()
    head.classifier = torch.nn.Identity()
    kept = (head(scales) != 0).flatten(2).any(-1)
    alive = (head.eval()(scales) != 0).flatten(2).any(-1)
    assert 0 < (alive & ~kept).sum() < 0.3 * alive.sum()


def test_logits_depend_on_the_attention(monkeypatch):
    torch.manual_seed(0)
    net, images = SegFormer(in_channels=2, num_classes=3, **TINY).eval(), torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        logits = net(images)
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value: query)
        difference = net(images) - logits
    assert difference.abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("size", [(29, 29), (33, 50), (64, 32)])
def test_sides_need_not_be_divisible(size):
    net = SegFormer(in_channels=1, num_classes=2, **TINY).eval()
    assert net(torch.zeros(2, 1, *size)).shape == (2, 2, *size)


def test_short_side_is_refused_with_a_size_that_works():
    net = SegFormer(in_channels=1, num_classes=1, **TINY)
    message = (
        "model=segformer needs sides of 29 pixels or more, got 28x40; set dataset.image_size=64"
    )
    with pytest.raises(ShapeError, match=message):
        net(torch.zeros(1, 1, 28, 40))


def test_volumes_are_refused():
    with pytest.raises(ShapeError, match=r"model=segformer takes 2D images"):
        SegFormer(in_channels=1, num_classes=1, **TINY)(torch.zeros(1, 1, 32, 32, 32))
