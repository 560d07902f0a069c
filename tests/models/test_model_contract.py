"""What every model of conf/model promises."""

import io
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from medlite import config
from medlite.errors import ShapeError
from medlite.export.export import export
from medlite.models.layers import mamba, mamba2d, ss2d
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.types import Hardware

FILES = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
NAMES = [file.stem for file in FILES]
VOLUMETRIC = {"resnet18_3d", "slice_mamba_unet"}
"""Those that take volumes alone."""
CLASSIFIERS_OF_MONAI = {"resnet18_3d"}
"""MONAI's networks do not say what they are for."""
SCANNING = {file.stem for file in FILES if "layers.ssm.Ssm" in file.read_text()} | {
    "light_vm2d_unet"
}
SCANS = [
    (mamba, "selective_scan"), (mamba, "ssd_scan"), (ss2d, "selective_scan"), (ss2d, "ssd_scan"),
    (mamba2d, "wavefront_scan"),
]  # fmt: skip
ATTENDING = {
    "vit_tiny", "vit_base", "deit_tiny_distilled", "mobilevit_xs", "transmed_t", "medvit_s",
    "inception_transformer_s", "segformer_b0", "esfpnet_b0", "levit_unet_128s",
}  # fmt: skip
"""Those that call torch's attention; others write it out, and have tests of their own."""
IN_CHANNELS, NUM_CLASSES = 2, 3

for_every_model = pytest.mark.parametrize("name", NAMES)


def sizes_of(name):
    return [(16, 16, 16), (24, 16, 16)] if name in VOLUMETRIC else [(32, 32), (64, 32)]


def build(name, image_size):
    """As the pipeline does: the data's facts go to the constructors that want them."""
    node = yaml.safe_load((FILES[0].parent / f"{name}.yaml").read_text())
    facts = {"in_channels": IN_CHANNELS, "num_classes": NUM_CLASSES, "image_size": image_size}
    torch.manual_seed(0)
    return config.build(node, **facts, spatial_dims=len(image_size))


def is_classifier(name, net):
    return name in CLASSIFIERS_OF_MONAI or net.tasks == ("classification",)


def make_images(batch, image_size):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, IN_CHANNELS, *image_size, generator=generator)


def with_lively_scans(net):
    """Let states weigh as much as the direct path beside them, as they do not in a fresh net."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "x_proj" in name:
                parameter.mul_(10)
            if "dt_proj" in name and name.endswith("bias"):
                parameter.add_(3)
    return net


def test_the_list_of_models_is_complete():
    assert len(FILES) >= 57


@for_every_model
def test_logits_have_the_promised_shape_at_two_sizes_and_batches(name):
    for image_size in sizes_of(name):
        net = build(name, image_size).eval()
        for batch in (1, 3):
            with torch.no_grad():
                logits = net(make_images(batch, image_size))
            spatial = () if is_classifier(name, net) else image_size
            assert logits.shape == (batch, NUM_CLASSES, *spatial)
            assert logits.dtype == torch.float32
            assert logits.isfinite().all()


@for_every_model
def test_gradients_reach_every_parameter(name):
    size = sizes_of(name)[-1]
    net = build(name, size).train()
    net(make_images(2, size)).square().sum().backward()
    missing = [key for key, p in net.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in net.parameters())


@for_every_model
def test_weights_round_trip_and_the_same_weights_give_the_same_logits(name):
    size = sizes_of(name)[0]
    images, net = make_images(2, size), build(name, size)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.01)
    stream = io.BytesIO()
    torch.save(net.state_dict(), stream)
    stream.seek(0)
    twin = build(name, size)
    twin.load_state_dict(torch.load(stream, weights_only=True))
    with torch.no_grad():
        assert torch.equal(net.eval()(images), twin.eval()(images))


@for_every_model
def test_images_of_a_batch_do_not_mix(name):
    size = sizes_of(name)[0]
    net, images = build(name, size).eval(), make_images(3, size)
    with torch.no_grad():
        together, alone = net(images), net(images[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def run(name, image_size):
    net = build(name, image_size).eval()
    with torch.no_grad():
        return net, net(make_images(1, image_size))


def proposed_size(error, dims):
    sides = [int(side) for side in re.findall(r"\d+", str(error).partition("image_size=")[2])]
    return tuple(sides) if len(sides) == dims else tuple(sides[:1]) * dims


@for_every_model
def test_a_size_is_taken_or_refused_with_one_that_works(name):
    """No image is cropped, padded or mistaken in silence."""
    size = (22, 22, 10) if name in VOLUMETRIC else (46, 46)
    try:
        net, logits = run(name, size)
    except ShapeError as error:
        size = proposed_size(error, len(size))
        net, logits = run(name, size)
    assert logits.shape == (1, NUM_CLASSES, *(() if is_classifier(name, net) else size))


@for_every_model
def test_images_of_another_dimension_are_refused(name):
    size = sizes_of(name)[0]
    wrong = size[:2] if name in VOLUMETRIC else (*size, 16)
    with pytest.raises(ShapeError, match=r"takes [23]D (images|volumes) .*, got"):
        build(name, size).eval()(torch.zeros(1, IN_CHANNELS, *wrong))


@pytest.mark.parametrize("name", NAMES)
def test_attention_counts_where_there_is_any(monkeypatch, name):
    """Each token would see itself alone; at 64 pixels even coarse maps have several tokens."""
    size = sizes_of(name)[-1] if name in VOLUMETRIC else (64, 64)
    net, images = build(name, size).eval(), make_images(2, size)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.ones_(module.weight)  # LeViT starts its branches at zero
    calls = []

    def see_self_alone(query, key, value, *_, **__):
        calls.append(1)
        if key.shape[2] == query.shape[2]:
            return value
        return value.mean(2, keepdim=True).expand(-1, -1, query.shape[2], -1)

    with torch.no_grad():
        logits = net(images)
        monkeypatch.setattr(F, "scaled_dot_product_attention", see_self_alone)
        changed = net(images)
    assert bool(calls) == (name in ATTENDING)
    assert torch.equal(logits, changed) == (name not in ATTENDING)


def test_the_list_of_models_that_scan_is_complete():
    assert len(SCANNING) >= 11


@pytest.mark.parametrize("name", sorted(SCANNING))
@pytest.mark.parametrize(
    "stand_in", [lambda x, *_: x, lambda x, *_: torch.zeros_like(x)], ids=["identity", "zero"]
)
def test_logits_depend_on_the_scans(monkeypatch, name, stand_in):
    size = sizes_of(name)[0]
    net, images = with_lively_scans(build(name, size).eval()), make_images(2, size)
    with torch.no_grad():
        logits = net(images)
        for module, scan in SCANS:
            monkeypatch.setattr(module, scan, stand_in)
        difference = net(images) - logits
    assert difference.abs().max() > 0.01 * logits.abs().max()


@pytest.mark.slow
@for_every_model
def test_model_exports_with_any_batch_size(name):
    size = sizes_of(name)[0]
    net = build(name, size).eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (make_images(2, size),), dynamic_shapes=({0: batch},))
    for count in (1, 3):
        images = make_images(count, size)
        torch.testing.assert_close(program.module()(images), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@for_every_model
def test_onnx_file_agrees_with_torch(name, tmp_path):
    size = sizes_of(name)[0]
    net, images = with_lively_scans(build(name, size).eval()), make_images(3, size)
    artifact = export(
        net, format="onnx", input_shape=(IN_CHANNELS, *size), directory=tmp_path, stem="net"
    )
    session = OnnxRuntime().load(artifact, Hardware(num_threads=1))
    with torch.no_grad():
        expected = net(images)
    error = torch.from_numpy(session(images.numpy())) - expected
    assert error.abs().max() < 1e-4 * expected.abs().max()


def test_parameters_are_as_registered():
    """For 3 channels and 1000 classes (segmentation: 1), at the size that a model is made for.

    A change of a network must be seen here; that the counts are those of the papers and of the
    published code is under test beside each network, and by `medlite audit`.
    """
    registered = yaml.safe_load((Path(__file__).parent / "parameter_counts.yaml").read_text())
    assert count_parameters_of_all() == registered


def count_parameters_of_all():
    counts = {}
    for name, file in zip(NAMES, FILES, strict=True):
        facts = {"in_channels": 3, "spatial_dims": 3 if name in VOLUMETRIC else 2}
        node = yaml.safe_load(file.read_text())
        with torch.device("meta"):
            net = config.build(node, **facts, num_classes=1)
            if is_classifier(name, net):
                net = config.build(node, **facts, num_classes=1000)
        counts[name] = sum(parameter.numel() for parameter in net.parameters())
    return counts
