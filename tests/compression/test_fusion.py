import copy
import io

import pytest
import torch
from batch_norms import norms_of, with_statistics
from monai.networks.nets import BasicUNet, resnet10
from torch import nn
from toy_world import TinyClassifier, TinyUNet, make_batch, make_context, make_spec

from medlite.compression.fine_tuning import FineTuning
from medlite.compression.fusion import Fuse
from medlite.compression.order import check_order
from medlite.compression.pruning import StructuredPruning
from medlite.compression.quantization import PostTrainingQuantization, QuantizationAwareTraining
from medlite.compression.quantized_graph import prepare
from medlite.compression.quantizer import Int8Quantizer
from medlite.errors import ConfigError, MedliteError
from medlite.models.mk_unet import MKUNet
from medlite.models.timm_classifier import TimmClassifier
from medlite.models.u_lite import ULite

STEP = Fuse(num_checked_images=4, tolerance=1e-4)


def basic_unet(spatial_dims):
    return BasicUNet(
        spatial_dims=spatial_dims, in_channels=1, out_channels=1, features=(4,) * 6,
        act="RELU", norm="BATCH", upsample="nontrainable",
    )  # fmt: skip


SEGMENTERS = {
    "tiny_unet": (TinyUNet, (32, 32), 4, 0),
    "unet": (lambda: basic_unet(2), (32, 32), 18, 0),
    "unet_3d": (lambda: basic_unet(3), (32, 16, 16), 18, 0),
    "mk_unet_t": (
        lambda: MKUNet(in_channels=1, num_classes=1, widths=(4, 8, 16, 24, 32)), (32, 32), 62, 0,
    ),
    "u_lite": (
        lambda: ULite(in_channels=1, num_classes=1, widths=(4, 8, 8, 8, 8, 8)), (32, 32), 5, 6,
    ),
}  # fmt: skip
"""builder, image size, normalisations that are folded, normalisations that stay"""


def saved_and_loaded(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_step(build, spec):
    """The same logits, the given net untouched, an exact way back."""
    torch.manual_seed(0)
    net = with_statistics(build())
    before = copy.deepcopy(net.state_dict())
    context = make_context(spec)
    fused, state = STEP.apply(net, context)

    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    image = make_batch(spec, 2, seed=3).image
    logits = net(image)
    assert (fused(image) - logits).abs().max() < 1e-5 * logits.abs().max()
    assert all(parameter.requires_grad for parameter in fused.parameters())

    state, weights = saved_and_loaded((state, fused.state_dict()))
    restored = STEP.restore(build(), state, spec)
    restored.load_state_dict(weights, strict=True)
    assert (restored(image) - fused(image)).abs().max().item() == 0.0
    return net, fused, context


SLOW = ("mk_unet_t", "unet_3d")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SEGMENTERS]
)
def test_fused_segmentation_net_computes_the_same_and_restores_exactly(name):
    build, image_size, num_folded, num_kept = SEGMENTERS[name]
    net, fused, context = check_step(build, make_spec(image_size=image_size))
    assert len(norms_of(net)) == num_folded + num_kept
    assert len(norms_of(fused)) == num_kept
    expected = f"{num_folded} of {num_folded + num_kept} batch normalisations folded"
    assert expected in context.report.lines["fusion"]


def test_fused_classifier_computes_the_same_and_restores_exactly(classes):
    _, fused, _ = check_step(TinyClassifier, classes)
    assert not norms_of(fused)


def test_fused_residual_classifier_of_volumes_restores_exactly():
    spec = make_spec("classification", "multiclass", (16, 16, 16), 3)

    def build():
        return resnet10(spatial_dims=3, n_input_channels=1, num_classes=3, widen_factor=0.125)

    _, fused, _ = check_step(build, spec)
    assert not norms_of(fused)


@pytest.mark.slow
def test_branches_merge_into_a_net_that_can_be_trained(classes):
    def build():
        return TimmClassifier(in_channels=1, num_classes=3, name="mobileone_s0")

    net, fused, context = check_step(build, classes)
    assert not norms_of(fused)
    num_convolutions = sum(isinstance(module, nn.Conv2d) for module in fused.modules())
    assert num_convolutions == 43
    report = context.report.lines["fusion"]
    assert "branches merged: 192 convolutions and linear layers became 44" in report
    assert f"from {count_parameters(net):,} to {count_parameters(fused):,} parameters" in report


def count_parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def test_what_stays_is_reported(spec):
    net = with_statistics(nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
    context = make_context(spec)
    STEP.apply(net, context)
    assert context.report.lines["not fused"] == "1 not behind a convolution or linear layer (0)"


class Aliased(nn.Module):
    """A layer and a normalisation that have two names each."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.block = nn.Sequential(self.conv, self.norm)

    def forward(self, image):
        return self.block(image)


def test_modules_with_two_names_are_folded_under_both(spec):
    _, fused, _ = check_step(Aliased, spec)
    assert isinstance(fused.block[1], nn.Identity)
    assert isinstance(fused.norm, nn.Identity)
    assert fused.block[0] is fused.conv


class Branches(nn.Module):
    """Two branches that merge once, and freeze what stands beside them, as blocks of timm do."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.beside = nn.Conv2d(1, 1, 1)

    def forward(self, image):
        merged = getattr(self, "merged", None)
        return self.beside(merged(image) if merged else self.one(image) + self.two(image))

    def deploy(self):
        net = copy.deepcopy(self)
        net.merged = nn.Conv2d(1, 1, 3, padding=1)
        net.merged.weight.data = self.one.weight.data + self.two.weight.data
        net.merged.bias.data = self.one.bias.data + self.two.bias.data
        del net.one, net.two
        return net.requires_grad_(False)


def test_a_merged_net_is_trainable_and_is_not_merged_again(spec):
    _, fused, _ = check_step(Branches, spec)
    quantizer = Int8Quantizer(keep_first_float=False, keep_last_float=False, keep_float=())
    prepare(fused, spec.input_shape, quantizer)
    assert quantizer.quantized_layers == ("merged", "beside")


def test_branches_that_do_not_merge_right_are_found(spec):
    class Wrong(Branches):
        def deploy(self):
            net = super().deploy()
            net.merged.weight.data *= 2
            return net

    with pytest.raises(MedliteError, match=r"the first to differ is layer 'beside'"):
        STEP.apply(Wrong().eval(), make_context(spec))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.middle, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)

    def forward(self, image):
        features = self.stem(image)
        return self.head(self.middle(features + torch.rand_like(features)))


def test_a_difference_names_the_first_layer_that_differs(spec):
    expected = r"fusion changes what Noisy computes.*tolerance=0.0001.*layer 'middle'; leave"
    with pytest.raises(MedliteError, match=expected):
        STEP.apply(Noisy().eval(), make_context(spec))


def test_logits_that_are_no_numbers_are_a_difference(spec):
    net = TinyUNet().eval()
    nn.init.constant_(net.refine[1].weight, torch.nan)
    with pytest.raises(MedliteError, match=r"differ by nan.*layer 'refine.1'"):
        STEP.apply(net, make_context(spec))


def test_a_net_with_nothing_to_fuse_is_refused_with_the_reason(spec):
    without = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.InstanceNorm2d(1))
    with pytest.raises(MedliteError, match=r"in Sequential: it has no branches.*and no batch norm"):
        STEP.apply(without, make_context(spec))
    before = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding=1))
    with pytest.raises(
        MedliteError, match=r"none .*: 1 not behind a convolution or linear layer \(0\)"
    ):
        STEP.apply(before, make_context(spec))


def test_a_fused_net_is_refused(spec):
    fused, _ = STEP.apply(TinyUNet(), make_context(spec))
    with pytest.raises(MedliteError, match="nothing could be fused in TinyUNet"):
        STEP.apply(fused, make_context(spec))


def test_quantisation_finds_the_same_layers_and_is_as_close(spec, trained_unet):
    fused, _ = STEP.apply(trained_unet, make_context(spec))
    image = make_batch(spec, 8, seed=5).image
    logits = trained_unet(image)
    layers, errors = [], []
    for net in (trained_unet, fused):
        quantizer = Int8Quantizer(keep_first_float=True, keep_last_float=True, keep_float=())
        prepare(net, spec.input_shape, quantizer)
        layers.append((quantizer.quantized_layers, quantizer.float_layers))
        step = PostTrainingQuantization(calibration_samples=8)
        quantised, _ = step.apply(net, make_context(spec))
        errors.append((quantised(image) - logits).square().mean().item())
    assert layers[0] == layers[1]
    assert 0 < errors[1] < 1.02 * errors[0]


def test_quantisation_aware_training_takes_a_fused_net(spec, trained_unet):
    fused, _ = STEP.apply(trained_unet, make_context(spec))
    step = QuantizationAwareTraining(epochs=1, learning_rate=1e-4, calibration_samples=8)
    quantised, state = step.apply(fused, make_context(spec))
    restored = step.restore(fused, state, spec)
    restored.load_state_dict(quantised.state_dict(), strict=True)
    image = make_batch(spec, 2).image
    assert torch.equal(restored(image), quantised(image))


def test_fine_tuning_moves_folded_weights_and_biases(spec, trained_unet):
    fused, _ = STEP.apply(trained_unet, make_context(spec))
    tuned, _ = FineTuning(epochs=1, learning_rate=1e-3).apply(fused, make_context(spec))
    assert not torch.equal(tuned.refine[0].weight, fused.refine[0].weight)
    assert not torch.equal(tuned.refine[0].bias, fused.refine[0].bias)


@pytest.mark.parametrize("names", [("prune", "fuse", "ptq"), ("fuse", "prune", "ptq")])
def test_pruning_fusion_and_quantisation_restore_one_after_another(names, spec):
    steps = {
        "prune": StructuredPruning(epochs=1, learning_rate=1e-3, importance="magnitude"),
        "fuse": STEP,
        "ptq": PostTrainingQuantization(calibration_samples=8),
    }
    torch.manual_seed(0)
    net, restored = with_statistics(TinyUNet()), TinyUNet()
    for name in names:
        net, state = steps[name].apply(net, make_context(spec, steps=1))
        restored = steps[name].restore(restored, state, spec)
    restored.load_state_dict(net.state_dict(), strict=True)
    image = make_batch(spec, 2).image
    assert torch.equal(restored(image), net(image))


def test_a_pruned_net_is_fused_at_its_new_size(spec):
    step = StructuredPruning(epochs=1, learning_rate=1e-3, importance="magnitude")
    pruned, _ = step.apply(with_statistics(TinyUNet()), make_context(spec, steps=1))
    fused, _ = STEP.apply(pruned, make_context(spec))
    assert fused.merge[0].weight.shape == (8, 24, 3, 3)
    assert fused.merge[0].bias.shape == (8,)


def test_fusion_stands_before_quantisation_and_once():
    assert (
        check_order({"prune": StructuredPruning, "fuse": Fuse, "q": PostTrainingQuantization}) == []
    )
    (problem,) = check_order({"q": QuantizationAwareTraining, "fuse": Fuse})
    assert problem.startswith("compression: 'fuse' cannot follow 'q', whose result is a fixed")
    assert check_order({"fuse": Fuse, "again": Fuse}) == [
        "compression: 'fuse' and 'again' are the same step; give it once"
    ]


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="num_checked_images: 0 is not a whole number from 1 up"):
        Fuse(num_checked_images=0)
    with pytest.raises(ConfigError, match=r"tolerance: 1\.0 is not in \(0, 1\)"):
        Fuse(tolerance=1.0)
