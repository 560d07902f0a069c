"""ESFPNet against the published counts and its pyramid written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from medlite.errors import ShapeError
from medlite.models.esfpnet import ESFPNet, FeaturePyramid

TINY = {"widths": (8, 16, 20, 16), "depths": (1, 1, 1, 1)}
LARGE_WIDTHS = (64, 128, 320, 512)


def up(features, scale):
    return F.interpolate(features, scale_factor=scale, mode="bilinear", align_corners=False)


def count_parameters(**options):
    with torch.device("meta"):
        net = ESFPNet(in_channels=3, num_classes=1, **options)
    return sum(p.numel() for p in net.parameters()), sum(
        p.numel() for p in net.decoder.parameters()
    )


def test_parameters_are_those_of_the_published_code():
    total, pyramid = count_parameters()
    assert total == 3_532_129
    assert pyramid + 513 == 212_737


@pytest.mark.parametrize(
    ("depths", "millions"), [((3, 4, 6, 3), 25.04), ((3, 8, 27, 3), 61.69)], ids=["B2", "B4"]
)
def test_parameters_on_larger_encoders_are_the_published_ones(depths, millions):
    total, _ = count_parameters(widths=LARGE_WIDTHS, depths=depths)
    assert total / 1e6 == pytest.approx(millions, abs=0.005)


def test_multiply_adds_at_352_pixels_are_those_of_the_published_code():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        ESFPNet(in_channels=3, num_classes=1).eval()(torch.empty(1, 3, 352, 352))
    assert counter.get_total_flops() / 2e9 == pytest.approx(1.407, rel=0.001)


def test_pyramid_fuses_from_coarse_to_fine_and_keeps_every_result():
    torch.manual_seed(0)
    pyramid = FeaturePyramid((4, 6, 8)).eval()
    for fusion in pyramid.fusions:
        fusion.mix[1].running_mean.normal_()
        fusion.mix[1].running_var.uniform_(0.5, 2)
    scales = [torch.randn(2, 4, 8, 12), torch.randn(2, 6, 4, 6), torch.randn(2, 8, 2, 3)]

    def predict(layer, features):
        weight, bias = layer.proj.weight, layer.proj.bias
        return torch.einsum("bchw,oc->bohw", features, weight) + bias[:, None, None]

    def fuse(fusion, fine, coarse):
        conv, norm, _ = fusion.mix
        joined = torch.cat([fine, up(coarse, 2)], dim=1)
        mixed = torch.einsum("bchw,oc->bohw", joined, conv.weight[:, :, 0, 0])
        mixed = (mixed - norm.running_mean[:, None, None]) / (norm.running_var + 1e-5).sqrt()[
            :, None, None
        ]
        return predict(fusion.prediction, mixed.clamp(min=0))

    p1, p2, p3 = (predict(layer, s) for layer, s in zip(pyramid.predictions, scales, strict=True))
    p23 = fuse(pyramid.fusions[1], p2, p3)
    p12 = fuse(pyramid.fusions[0], p1, p23)
    expected = torch.cat([p12, up(p23, 2), up(p3, 4)], dim=1)
    torch.testing.assert_close(pyramid(scales), expected)


def test_logits_are_those_of_a_quarter_of_the_size_interpolated():
    torch.manual_seed(0)
    net, images = ESFPNet(in_channels=2, num_classes=3, **TINY).eval(), torch.randn(1, 2, 64, 32)
    small = net.head(net.decoder(net.encoder(images)))
    assert small.shape == (1, 3, 16, 8)
    torch.testing.assert_close(net(images), up(small, 4))


def test_logits_depend_on_the_attention(monkeypatch):
    torch.manual_seed(0)
    net, images = ESFPNet(in_channels=2, num_classes=3, **TINY).eval(), torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        logits = net(images)
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value: query)
        difference = net(images) - logits
    assert difference.abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("size", [(29, 29), (33, 50), (64, 32)])
def test_sides_need_not_be_divisible(size):
    net = ESFPNet(in_channels=1, num_classes=2, **TINY).eval()
    assert net(torch.zeros(2, 1, *size)).shape == (2, 2, *size)


def test_short_side_is_refused_with_a_size_that_works():
    net = ESFPNet(in_channels=1, num_classes=1, **TINY)
    message = "model=esfpnet needs sides of 29 pixels or more, got 16x28; set dataset.image_size=32"
    with pytest.raises(ShapeError, match=message):
        net(torch.zeros(1, 1, 16, 28))


def test_volumes_are_refused():
    with pytest.raises(ShapeError, match=r"model=esfpnet takes 2D images"):
        ESFPNet(in_channels=1, num_classes=1, **TINY)(torch.zeros(1, 1, 32, 32, 32))
