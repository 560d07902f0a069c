import numpy as np
import pytest
import torch
from monai.data.meta_obj import get_track_meta

from medlite.data.augmentation import RECIPES, Augmentation


def disc(size, centre, radius=6):
    grid = np.stack(np.indices(size), -1)
    return torch.from_numpy(
        (((grid - np.array(centre)) ** 2).sum(-1) <= radius**2).astype(np.int64)
    )


@pytest.mark.parametrize("size", [(32, 24), (16, 20, 12)])
@pytest.mark.parametrize("modality", sorted(RECIPES))
def test_shapes_types_and_mask_values_stay(modality, size):
    augment = Augmentation(modality, size)
    mask = disc(size, [side / 2 for side in size])
    for position in range(8):
        image, changed = augment(torch.randn(2, *size), mask, (0, 0, position))
        assert image.shape == (2, *size)
        assert image.dtype == torch.float32
        assert type(image) is torch.Tensor
        assert image.is_contiguous()
        assert changed.shape == size
        assert changed.dtype == torch.int64
        assert set(changed.unique().tolist()) <= {0, 1}


def test_the_same_seed_makes_the_same_change_whatever_came_before():
    augment, other = Augmentation("mr", (32, 32)), Augmentation("mr", (32, 32))
    image = torch.randn(1, 32, 32)
    first, _ = augment(image, None, (3, 1, 4))
    for position in range(5):
        other(image, None, (3, 1, position + 10))
    again, _ = other(image, None, (3, 1, 4))
    assert torch.equal(first, again)
    assert any(
        not torch.equal(first, augment(image, None, (3, 2, position))[0]) for position in range(5)
    )


@pytest.mark.parametrize("modality", ["ct_patch", "shape", "phantom"])
def test_image_and_mask_move_together(modality):
    augment = Augmentation(modality, (48, 48))
    mask = disc((48, 48), (18, 30))
    image = mask[None] * 2.0 - 1.0
    moved = 0
    for position in range(20):
        changed_image, changed_mask = augment(image, mask, (0, 0, position))
        bright = changed_image[0] > 0
        overlap = 2 * (bright & (changed_mask == 1)).sum() / (bright.sum() + changed_mask.sum())
        assert overlap > 0.9
        moved += not torch.equal(changed_mask, mask)
    assert moved > 10


@pytest.mark.parametrize(
    ("modality", "mirrored"),
    [
        ("ct", set()),
        ("mr", set()),
        ("xray", set()),
        ("other", set()),
        ("ultrasound", {"lateral"}),
        ("oct", {"lateral"}),
        ("fundus", {"lateral"}),
        ("ct_patch", {"vertical", "lateral"}),
        ("microscopy", {"vertical", "lateral"}),
    ],
)
def test_only_mirrorings_that_keep_the_label_happen(modality, mirrored):
    """A disc near one edge must not turn up at the opposite edge."""
    augment = Augmentation(modality, (64, 64))
    seen = set()
    for axis, name in enumerate(["vertical", "lateral"]):
        centre = [32, 32]
        centre[axis] = 14
        mask = disc((64, 64), centre, radius=4)
        for position in range(40):
            _, changed = augment(mask[None].float(), mask, (0, axis, position))
            centroid = changed.nonzero().float().mean(0)
            if centroid[axis] > 40:
                seen.add(name)
    assert seen == mirrored


def test_shapes_keep_their_intensities_where_nothing_moves():
    augment = Augmentation("shape", (16, 16))
    image = torch.full((1, 16, 16), 0.25)
    for position in range(20):
        assert torch.allclose(augment(image, None, (0, 0, position))[0], image, atol=1e-5)


def test_unknown_modality_is_augmented_like_other():
    image = torch.randn(1, 16, 16)
    unknown, other = (Augmentation(name, (16, 16)) for name in ("thermography", "other"))
    for position in range(5):
        seed = (0, 0, position)
        assert torch.equal(unknown(image, None, seed)[0], other(image, None, seed)[0])


def test_metadata_tracking_of_monai_is_left_as_it_was():
    before = get_track_meta()
    Augmentation("ct", (16, 16))(torch.randn(1, 16, 16), None, (0, 0, 0))
    assert get_track_meta() == before
