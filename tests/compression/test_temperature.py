import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from toy_world import TinyUNet, make_batch, make_context, make_spec, train

from medlite.compression import temperature as temperature_module
from medlite.compression.quantization import PostTrainingQuantization
from medlite.compression.temperature import LARGEST, TemperatureScaling, fit_temperature
from medlite.export.export import export_all
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.runtimes.openvino import OpenVinoRuntime
from medlite.types import Batch, Hardware

HARDWARE = Hardware(num_threads=1)


@pytest.fixture(scope="module")
def spec():
    return make_spec()


@pytest.fixture(scope="module")
def net(spec):
    return train(TinyUNet(), spec, epochs=2)


def true_logits(seed=0, count=4000, num_classes=3):
    """Calibrated logits, and classes drawn from the probabilities that they mean."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, num_classes, generator=generator)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits, target


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found(temperature):
    logits, target = true_logits()
    found = fit_temperature(temperature * logits, target, labels="multiclass")
    assert found == pytest.approx(temperature, rel=0.05)  # 4,000 draws tell no more


def test_binary_logits_agree_with_logistic_regression():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2000, 1, generator=generator)
    target = (torch.rand(2000, generator=generator) < (2.5 * logits[:, 0]).sigmoid()).long()
    model = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-10)
    model.fit(logits.numpy(), target.numpy())
    found = fit_temperature(logits, target, labels="binary")
    assert found == pytest.approx(1 / model.coef_.item(), rel=1e-4)


def test_multilabel_logits_share_one_temperature():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2000, 2, generator=generator)
    target = (torch.rand(2000, 2, generator=generator) < (logits / 2).sigmoid()).long()
    found = fit_temperature(logits, target, labels="multilabel")
    assert found == pytest.approx(2, rel=0.1)


def test_faultless_decisions_do_not_make_infinite_confidence():
    logits = torch.eye(3)
    found = fit_temperature(logits, torch.arange(3), labels="multiclass")
    assert found == pytest.approx(1 / LARGEST, rel=1e-3)


def test_a_net_is_divided_by_what_its_validation_images_say(spec, net):
    context = make_context(spec)
    scaled, state = TemperatureScaling().apply(net, context)
    batches = context.validation_batches(100)
    with torch.no_grad():
        logits = torch.cat([net(batch.image) for batch in batches])
    masks = torch.cat([batch.target for batch in batches])
    losses = {
        t: nn.functional.binary_cross_entropy_with_logits(logits[:, 0] / t, masks.float()).item()
        for t in np.geomspace(1 / LARGEST, LARGEST, 400)
    }
    best = min(losses, key=losses.__getitem__)
    assert state["temperature"] == pytest.approx(best, rel=0.02)
    image = make_batch(spec, 2, seed=3).image
    torch.testing.assert_close(scaled(image), net(image) / state["temperature"])
    assert f"{state['temperature']:.3f}; NLL on " in context.report.lines["temperature"]


def test_the_pixels_of_a_volume_are_drawn_from_all_of_its_slices(monkeypatch):
    """Every 16th pixel would be of the first of 16 slices, where all decisions are right."""
    masks = torch.zeros(2, 32, 32, 16, dtype=torch.long)
    masks[:, 8:24, 8:24] = 1
    generator = torch.Generator().manual_seed(1)
    is_wrong = torch.rand(masks.shape, generator=generator) < 0.2
    is_wrong[..., 0] = False
    images = torch.where((masks > 0) != is_wrong, 3.0, -3.0)[:, None]
    monkeypatch.setattr(temperature_module, "MAX_PIXELS", masks.numel() // 16)
    batch = Batch(images, masks, torch.arange(2))
    spec = make_spec(image_size=(32, 32, 16))
    context = replace(make_context(spec), validation_batches=lambda _: [batch])
    _, state = TemperatureScaling().apply(nn.Identity(), context)
    expected = fit_temperature(images, masks, labels="binary")
    assert state["temperature"] == pytest.approx(expected, rel=0.1)  # 2,048 draws tell no more


def applied_to(images, classes):
    """The temperature that a net which gives its images as logits gets, and what is reported."""
    batch = Batch(images, classes, torch.arange(len(images)))
    labels = "multilabel" if classes.ndim > 1 else "multiclass"
    spec = make_spec("classification", labels, num_classes=3)
    context = replace(make_context(spec), validation_batches=lambda _: [batch])
    _, state = TemperatureScaling().apply(nn.Identity(), context)
    return state["temperature"], context.report.lines["temperature"]


@pytest.mark.parametrize("labels", ["multiclass", "multilabel"])
def test_faultless_decisions_leave_the_logits_as_they_are(labels):
    classes = torch.arange(3)
    target = classes if labels == "multiclass" else torch.eye(3).long()
    temperature, text = applied_to(4 * torch.eye(3) - 1, target)
    assert temperature == 1.0
    assert "no decision on 3 validation images is wrong" in text


def test_a_temperature_at_the_end_of_its_range_is_reported_as_such():
    """Every decision is wrong, so that the less confident, the better."""
    temperature, text = applied_to(4 * torch.eye(3), torch.tensor([1, 2, 0]))
    assert temperature == pytest.approx(LARGEST, rel=0.01)
    assert "THIS IS THE END OF THE RANGE, 20" in text


@pytest.mark.parametrize("is_quantized", [False, True])
def test_every_form_is_restored_and_exported_with_its_temperature(
    spec, net, tmp_path, is_quantized
):
    if is_quantized:
        net, _ = PostTrainingQuantization(calibration_samples=16).apply(net, make_context(spec))
    step = TemperatureScaling()
    scaled, state = step.apply(net, make_context(spec))
    assert not math.isclose(state["temperature"], 1, rel_tol=0.01)
    restored = step.restore(net, {"temperature": 7.0}, spec)
    restored.load_state_dict(scaled.state_dict())
    image = make_batch(spec, 2, seed=3).image
    with torch.no_grad():
        assert torch.equal(restored(image), scaled(image))
        torch.testing.assert_close(scaled(image), net(image) / state["temperature"])
    artifacts = {
        stem: export_all(
            each, formats=["onnx", "openvino"], input_shape=spec.input_shape, directory=tmp_path,
            stem=stem,
        )
        for stem, each in {"plain": net, "scaled": restored}.items()
    }  # fmt: skip
    for runtime in (OnnxRuntime(), OpenVinoRuntime()):
        plain, divided = (by_format[runtime.format] for by_format in artifacts.values())
        assert divided.precision == plain.precision == ("int8" if is_quantized else "fp32")
        logits, expected = (
            runtime.load(each, HARDWARE)(image[:1].numpy()) for each in (divided, plain)
        )
        np.testing.assert_allclose(logits, expected / state["temperature"], rtol=1e-4, atol=1e-6)


def test_a_dry_run_fits_nothing(spec, net):
    context = make_context(spec)
    dry = type(context)(**{**vars(context), "is_dry": True})
    scaled, state = TemperatureScaling().apply(net, dry)
    image = make_batch(spec, 2).image
    assert state == {"temperature": 1.0}
    assert torch.equal(scaled(image), net(image))
