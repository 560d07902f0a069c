"""The timm adapters: sizes, merging, and what is said about mistakes."""

import pytest
import torch
import torch_pruning
from huggingface_hub import constants
from torch import nn
from torch.export import Dim

from medlite.errors import ConfigError, MedliteError, ShapeError
from medlite.models.timm_classifier import TimmClassifier
from medlite.models.timm_unet import TimmUNet


def classifier(name, **arguments):
    torch.manual_seed(0)
    return TimmClassifier(in_channels=1, num_classes=3, name=name, **arguments)


def unet(encoder, **arguments):
    torch.manual_seed(0)
    return TimmUNet(in_channels=1, num_classes=2, encoder=encoder, **arguments)


def count_parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def randomise_statistics(net):
    """Running means and variances of a trained network, without training."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)


def test_published_parameter_counts():
    counts = {
        name: count_parameters(TimmClassifier(in_channels=3, num_classes=1000, name=name))
        for name in ("mobileone_s0", "resnet18", "mobilenetv3_small_100")
    }
    assert counts["mobileone_s0"] == 5_293_272
    assert round(counts["resnet18"] / 1e6, 2) == 11.69
    assert round(counts["mobilenetv3_small_100"] / 1e6, 3) == 2.543


def test_deployed_mobileone_has_the_published_size():
    net = TimmClassifier(in_channels=3, num_classes=1000, name="mobileone_s0")
    assert count_parameters(net.deploy()) == 2_078_504


@pytest.mark.parametrize("name", ["fastvit_t8", "repvgg_a0"])
def test_other_networks_with_branches_are_merged_too(name):
    net, images = classifier(name).eval(), torch.randn(2, 1, 64, 64)
    randomise_statistics(net)
    deployed = net.deploy()
    with torch.no_grad():
        expected = net(images)
        error = (deployed(images) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4
    assert len(list(deployed.modules())) < len(list(net.modules()))


@pytest.mark.parametrize("make", [classifier, unet])
def test_deployed_network_is_the_same_function_with_fewer_layers(make):
    net, images = make("mobileone_s0").eval(), torch.randn(2, 1, 64, 64)
    randomise_statistics(net)
    deployed = net.deploy()
    with torch.no_grad():
        expected = net(images)
        error = (deployed(images) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4
    assert count_parameters(deployed) < 0.5 * count_parameters(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules()) or make is unet


def test_network_can_be_deployed_after_pruning():
    net, images = classifier("mobileone_s0").eval(), torch.randn(2, 1, 32, 32)
    pruner = torch_pruning.pruner.MagnitudePruner(
        net,
        images,
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[net.net.get_classifier()],
    )
    pruner.step()
    with torch.no_grad():
        torch.testing.assert_close(net.deploy()(images), net(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (64, 32)])
def test_networks_with_a_fixed_grid_are_built_for_the_images(size):
    net = classifier("efficientformerv2_s0", image_size=size).eval()
    with torch.no_grad():
        assert net(torch.zeros(2, 1, *size)).shape == (2, 3)


def test_another_size_than_the_network_was_built_for_is_refused():
    net = classifier("efficientformerv2_s0", image_size=(64, 64)).eval()
    with pytest.raises(
        ShapeError, match="model=efficientformerv2_s0 was built for 64x64 images, got 32x32"
    ):
        net(torch.zeros(1, 1, 32, 32))


def test_impossible_size_is_refused_with_one_that_works():
    with pytest.raises(ShapeError, match=r"model=levit_128s cannot take 28x28 .*image_size=32"):
        classifier("levit_128s", image_size=(28, 28))
    classifier("levit_128s", image_size=(32, 32))


def test_building_leaves_the_mode_and_the_statistics_alone():
    net = classifier("resnet18", image_size=(32, 32))
    assert net.training
    assert net.net.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("model", [classifier, unet])
def test_volumes_are_refused(model):
    with pytest.raises(ShapeError, match="takes 2D images"):
        model("resnet18")(torch.zeros(1, 1, 32, 32, 32))


@pytest.mark.parametrize("make", [classifier, unet])
def test_networks_are_not_built_for_volumes(make):
    with pytest.raises(ShapeError, match=r"model=\w+ takes 2D images, got 28x28x28 volumes"):
        make("resnet18", image_size=(28, 28, 28))


def test_idle_dropout_is_taken_out_and_active_dropout_stays():
    idle, active = (
        classifier("efficientformerv2_s0"),
        classifier("vit_tiny_patch16_224", drop_rate=0.2),
    )
    assert not any(isinstance(module, nn.Dropout) for module in idle.modules())
    assert any(isinstance(module, nn.Dropout) for module in active.modules())


def test_misspelt_network_gets_the_closest_names():
    with pytest.raises(
        ConfigError, match=r"model\.name: timm has no network 'resnett18'.*resnet18"
    ):
        classifier("resnett18")
    with pytest.raises(ConfigError, match=r"model\.encoder: timm has no network 'mobilenet_v3'"):
        unet("mobilenet_v3")


def test_argument_that_the_network_lacks_is_named():
    with pytest.raises(ConfigError, match=r"model: .*unexpected keyword argument 'widht'"):
        classifier("resnet18", widht=2)


def test_missing_network_connection_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MedliteError, match=r"could not be downloaded; set model\.pretrained=false"):
        classifier("resnet18", pretrained=True)


def test_network_without_published_weights_is_explained():
    with pytest.raises(
        ConfigError, match=r"model\.pretrained: timm has no weights for 'cspresnet50w'"
    ):
        classifier("cspresnet50w", pretrained=True)


@pytest.mark.parametrize("encoder", ["mobilenetv3_small_100", "resnet18", "efficientformerv2_s0"])
@pytest.mark.parametrize("size", [(64, 64), (75, 50)])
def test_unet_takes_any_size(encoder, size):
    net = unet(encoder, image_size=size).eval()
    with torch.no_grad():
        assert net(torch.zeros(2, 1, *size)).shape == (2, 2, *size)


def test_unet_exports_with_any_batch_size():
    net = unet("mobilenetv3_small_100").eval()
    shapes = ({0: Dim("batch", min=1)},)
    program = torch.export.export(net, (torch.zeros(2, 1, 50, 40),), dynamic_shapes=shapes)
    images = torch.randn(3, 1, 50, 40)
    torch.testing.assert_close(program.module()(images), net(images))


def test_encoder_of_one_scale_is_refused():
    with pytest.raises(
        ConfigError, match=r"model\.encoder: 'vit_tiny_patch16_224' has no feature maps of several"
    ):
        unet("vit_tiny_patch16_224", image_size=(32, 32))


def test_too_few_decoder_widths_are_refused():
    with pytest.raises(
        ConfigError, match=r"model\.decoder_channels: 'resnet18' needs 4 widths, got 2"
    ):
        unet("resnet18", decoder_channels=(32, 16))


def test_images_that_do_not_fill_the_patches_of_a_transformer_are_refused():
    with pytest.raises(ShapeError, match=r"divisible by its patches of 16x16, got 28x28; .*=32"):
        classifier("vit_tiny_patch16_224", image_size=(28, 28))
