import dataclasses
from itertools import product

import pytest
import torch
from torch import nn
from toy_world import TinyClassifier, TinyUNet, make_batch, make_context, make_spec, train

from medlite.compression.distillation import Distillation
from medlite.compression.divergence_weights import balanced_weights, decided_classes, near_boundary
from medlite.compression.teacher_divergence import hard_divergence, softened_divergence
from medlite.errors import ConfigError, MedliteError


def has_another_class_nearby(classes, place, width):
    """By a loop over the window."""
    ranges = [
        range(max(0, at - width), min(side, at + width + 1))
        for at, side in zip(place, classes.shape, strict=True)
    ]
    return any(classes[other] != classes[place] for other in product(*ranges))


@pytest.mark.parametrize("shape", [(9, 11), (5, 6, 7)])
@pytest.mark.parametrize("width", [1, 2])
def test_the_band_holds_the_pixels_with_another_class_in_their_window(shape, width):
    generator = torch.Generator().manual_seed(0)
    classes = (torch.rand(shape, generator=generator) < 0.03).long() * 2
    classes[0] = 1
    band = near_boundary(classes[None], width_px=width)[0]
    expected = torch.zeros(shape, dtype=torch.bool)
    for place in product(*map(range, shape)):
        expected[place] = has_another_class_nearby(classes, place, width)
    assert torch.equal(band, expected)
    assert 0 < band.float().mean() < 1


def test_one_class_has_no_boundary():
    assert not near_boundary(torch.full((2, 8, 8), 3), width_px=2).any()


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("labels", ["binary", "multiclass"])
def test_a_weighted_divergence_is_the_weighted_mean_over_pixels(kind, labels):
    torch.manual_seed(0)
    num_logits = 1 if labels == "binary" else 3
    student, teacher = torch.randn(2, 2, num_logits, 4, 5)
    weights = torch.rand(2, 1, 4, 5)

    def divergence(*logits, **options):
        if kind == "hard":
            return hard_divergence(*logits, labels=labels, **options)
        return softened_divergence(*logits, temperature=2.0, labels=labels, **options)

    total = sum(
        weights[b, 0, y, x] * divergence(student[b : b + 1, :, y, x], teacher[b : b + 1, :, y, x])
        for b, y, x in product(range(2), range(4), range(5))
    )
    value = divergence(student, teacher, weights=weights)
    assert value.item() == pytest.approx((total / weights.sum()).item(), rel=1e-5)
    alike = divergence(student, teacher, weights=torch.full_like(weights, 3.0))
    assert alike.item() == pytest.approx(divergence(student, teacher).item(), rel=1e-5)


def test_balanced_weights_are_inverse_frequencies_with_mean_one():
    spec = dataclasses.replace(make_spec("classification", "multiclass", num_classes=3),
                               class_counts=(60, 30, 10))  # fmt: skip
    weights = balanced_weights(torch.tensor([0, 1, 2]), spec)
    assert weights.shape == (3, 1)
    assert weights.mean().item() == pytest.approx(1.0)
    assert (weights[:, 0] * torch.tensor([6.0, 3.0, 1.0])).std() < 1e-6


def test_balanced_weights_of_pixels_follow_the_mask():
    spec = dataclasses.replace(make_spec(), class_counts=(90, 10))
    mask = make_batch(spec, 2).target
    weights = balanced_weights(mask, spec)
    assert weights.shape == (2, 1, *mask.shape[1:])
    assert torch.allclose(weights[:, 0], torch.where(mask > 0, 1.8, 0.2))


def test_each_label_of_several_is_balanced_by_itself():
    spec = dataclasses.replace(
        make_spec("classification", "multilabel", num_classes=2), class_counts=(8, 16)
    )
    weights = balanced_weights(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), spec)
    assert torch.allclose(weights, torch.tensor([[1.5, 1.0], [0.5, 1.0]]))


def test_decisions_of_a_segmentation_are_classes_of_pixels():
    logits = torch.randn(2, 3, 4, 4)
    assert torch.equal(decided_classes(logits, "multiclass"), logits.argmax(1))
    assert torch.equal(decided_classes(logits[:, :1], "binary"), (logits[:, 0] > 0).long())


class PixelTeacher(nn.Module):
    """Says no everywhere, so that only labels have boundaries."""

    def forward(self, image):
        return torch.full_like(image, -2.0)


@pytest.mark.parametrize("boundary_of", ["label", "teacher"])
def test_the_step_weighs_the_band_of_the_boundary_that_it_is_told(boundary_of):
    spec = make_spec()
    teacher = PixelTeacher() if boundary_of == "label" else train(TinyUNet(), spec, epochs=3)
    step = Distillation(
        epochs=1, learning_rate=1e-3, alpha=1.0, temperature=1.0, boundary_weight=4.0,
        boundary_width_px=1, boundary_of=boundary_of,
    )  # fmt: skip
    context = make_context(spec, teacher=teacher, steps=0)
    step.apply(TinyUNet(width=8), context)
    batch = make_batch(spec, 4, seed=2)
    logits = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        said = teacher.eval()(batch.image)
        value = context.fit.hooks.loss(logits, batch, lambda _: torch.zeros(()))
    classes = batch.target if boundary_of == "label" else (said[:, 0] > 0).long()
    weights = 1 + 4 * near_boundary(classes, width_px=1).float()
    p, q = said.sigmoid()[:, 0], logits.sigmoid()[:, 0]
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert value.item() == pytest.approx(
        ((weights * divergence).sum() / weights.sum()).item(), rel=1e-4
    )
    assert "5 times the weight within 1 px" in context.report.lines["distillation"]


class BlindTeacher(nn.Module):
    """Never says the rare class 2."""

    def forward(self, image):
        return (
            torch.tensor([3.0, 3.0, -3.0]).expand(len(image), 3)
            + 0 * image.mean((1, 2, 3))[:, None]
        )


def test_balanced_classes_change_whose_images_the_teacher_is_heard_on():
    spec = dataclasses.replace(make_spec("classification", "multiclass", num_classes=3),
                               class_counts=(60, 30, 10))  # fmt: skip
    context = make_context(spec, teacher=BlindTeacher(), steps=0)
    step = Distillation(epochs=1, learning_rate=1e-3, alpha=1.0, temperature=1.0,
                        class_weights="balanced")  # fmt: skip
    step.apply(TinyClassifier(), context)
    batch = make_batch(spec, 6, seed=2)._replace(target=torch.tensor([0, 0, 0, 1, 1, 2]))
    logits = torch.randn(6, 3)
    value = context.fit.hooks.loss(logits, batch, lambda _: torch.zeros(()))
    said = BlindTeacher()(batch.image)
    each = (said.softmax(1) * (said.log_softmax(1) - logits.log_softmax(1))).sum(1)
    weights = torch.tensor([1 / 60, 1 / 60, 1 / 60, 1 / 30, 1 / 30, 1 / 10])
    assert value.item() == pytest.approx(((weights * each).sum() / weights.sum()).item(), rel=1e-4)


def test_boundaries_are_refused_for_classification(classes):
    step = Distillation(epochs=1, learning_rate=1e-3, boundary_weight=1.0)
    message = r"distill\.boundary_weight: 1 weighs pixels, and dataset=toy is for classification"
    with pytest.raises(MedliteError, match=message):
        step.apply(TinyClassifier(), make_context(classes, teacher=TinyClassifier()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boundary_weight": -1.0}, "boundary_weight: -1.0 is not 0 or above"),
        ({"boundary_width_px": 0}, "boundary_width_px: 0 is not 1 up"),
        ({"boundary_of": "image"}, "boundary_of: 'image' is not label or teacher"),
        ({"class_weights": "even"}, "class_weights: 'even' is not none or balanced"),
        (
            {"alpha": 0.0, "class_weights": "balanced"},
            "class_weights: 'balanced' is not needed with alpha=0",
        ),
        (
            {"alpha": 0.0, "boundary_weight": 1.0},
            r"boundary_weight: 1\.0 is not needed with alpha=0, which does not compare logits",
        ),
    ],
)
def test_wrong_weights_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(**({"epochs": 1, "learning_rate": 1e-3} | options))
