import pytest
import torch
from toy_world import TinyUNet, make_context, make_spec

from medlite.compression.distillation import Distillation
from medlite.compression.feature_maps import as_map, deepest_features
from medlite.models.medmamba import MedMamba
from medlite.models.timm_classifier import TimmClassifier

SIZE = (64, 64)


def make_vit():
    return TimmClassifier(
        in_channels=1, num_classes=3, name="vit_tiny_patch16_224", image_size=(32, 32),
        patch_size=8, depth=2, embed_dim=24, num_heads=2,
    )  # fmt: skip


def make_medmamba(width=8):
    return MedMamba(in_channels=1, num_classes=3, width=width, depths=(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("shape", "seen"),
    [
        ((2, 8, 4, 4), (2, 8, 4, 4)),
        ((2, 4, 4, 8), (2, 8, 4, 4)),
        ((2, 16, 8), (2, 8, 4, 4)),
        ((2, 17, 8), (2, 8, 4, 4)),
        ((2, 18, 8), (2, 8, 4, 4)),
        ((2, 8), None),
        ((2, 3, 17, 40), None),
        ((2, 42, 8), None),
    ],
)
def test_maps_channels_last_and_tokens_are_seen_as_maps(shape, seen):
    found = as_map(torch.zeros(shape), SIZE)
    assert (None if found is None else tuple(found.shape)) == seen


def test_tokens_keep_their_places_behind_the_class_token():
    image = torch.arange(16.0).reshape(4, 4)
    tokens = torch.cat([torch.full((1, 1, 1), -9.0), image.reshape(1, 16, 1)], 1)
    assert torch.equal(as_map(tokens, SIZE)[0, 0], image)


def test_channels_last_keep_their_places():
    features = torch.randn(2, 5, 4, 8)
    assert torch.equal(as_map(features.permute(0, 2, 3, 1), (32, 64)), features)


def test_maps_of_a_long_image_and_of_a_volume_are_told_by_their_proportions():
    assert as_map(torch.zeros(1, 2, 4, 8), (64, 128)).shape == (1, 2, 4, 8)
    assert as_map(torch.zeros(1, 4, 4, 2, 7), (32, 32, 16)).shape == (1, 7, 4, 4, 2)


@pytest.mark.parametrize(
    ("side", "channels", "size"), [(56, 64, 224), (32, 24, 256), (56, 48, 224)]
)
def test_channels_last_are_seen_where_there_are_about_as_many_as_places(side, channels, size):
    seen = as_map(torch.zeros(1, side, side, channels), (size, size))
    assert seen.shape == (1, channels, side, side)
    seen = as_map(torch.zeros(1, channels, side, side), (size, size))
    assert seen.shape == (1, channels, side, side)


def test_the_deepest_map_of_a_vision_transformer_is_its_last_tokens():
    path = deepest_features(make_vit().eval(), torch.zeros(2, 1, 32, 32))
    assert path == "net.norm"


@pytest.mark.parametrize("make_teacher", [make_vit, make_medmamba], ids=["vit", "medmamba"])
@pytest.mark.parametrize("options", [{"feature_weight": 1.0}, {"rank_weight": 1.0}], ids=str)
def test_teachers_of_any_kind_and_task_teach_a_unet_by_their_maps(make_teacher, options):
    spec = make_spec()
    torch.manual_seed(0)
    context = make_context(spec, teacher=make_teacher(), steps=1)
    step = Distillation(epochs=1, learning_rate=1e-3, alpha=0.0, **options)
    student = TinyUNet(width=8)
    distilled, _ = step.apply(student, context)
    assert not torch.equal(distilled.down[1][0].weight, student.down[1][0].weight)
    assert "down from net.norm" in context.report.lines["distillation"] or make_teacher != make_vit


def test_a_state_space_net_teaches_a_smaller_one(classes):
    context = make_context(classes, teacher=make_medmamba(16), steps=1)
    step = Distillation(epochs=1, learning_rate=1e-3, feature_weight=1.0, rank_weight=1.0)
    distilled, _ = step.apply(make_medmamba(8), context)
    assert distilled(torch.zeros(2, 1, 32, 32)).isfinite().all()
