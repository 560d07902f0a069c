import pytest
import torch
from monai.losses import DiceLoss
from torch.nn import functional as F

from medlite.data.phantom import phantom
from medlite.errors import ConfigError
from medlite.tasks.losses import build_loss


def spec_of(**arguments):
    return phantom(image_size=(8, 8), num_train=12, num_val=4, num_test=4, **arguments).spec


def test_cross_entropy_weighs_classes_by_inverse_frequency():
    spec = spec_of(task="classification", labels="multiclass", num_classes=3)
    logits, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    inverse = 1 / torch.tensor(spec.class_counts).float()
    expected = F.cross_entropy(logits, target, weight=inverse / inverse.mean())
    loss = build_loss(spec, class_weights="balanced")(logits, target)
    torch.testing.assert_close(loss, expected)


def test_binary_segmentation_loss_is_dice_plus_cross_entropy():
    spec = spec_of(task="segmentation", labels="binary")
    logits, target = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 8, 8))
    dice = DiceLoss(sigmoid=True, batch=True)(logits, target[:, None].float())
    entropy = F.binary_cross_entropy_with_logits(logits[:, 0], target.float())
    torch.testing.assert_close(build_loss(spec)(logits, target), dice + entropy)


@pytest.mark.parametrize("name", ["dice_ce", "dice_focal", "cross_entropy", "focal"])
@pytest.mark.parametrize("labels", ["binary", "multiclass"])
def test_segmentation_losses_prefer_the_truth(name, labels):
    spec = spec_of(task="segmentation", labels=labels, num_classes=1 if labels == "binary" else 3)
    target = torch.randint(0, max(2, spec.num_classes), (2, 8, 8))
    if labels == "binary":
        right = (target[:, None].float() - 0.5) * 10
    else:
        right = F.one_hot(target, spec.num_classes).movedim(-1, 1).float() * 10
    loss = build_loss(spec, name=name, class_weights="balanced")
    assert loss(right, target) < loss(-right, target)


def test_multilabel_loss_takes_one_target_for_each_logit():
    spec = spec_of(task="classification", labels="multilabel", num_classes=3)
    logits, target = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    expected = F.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(build_loss(spec)(logits, target), expected)


def test_a_loss_of_another_task_is_refused():
    spec = spec_of(task="classification", labels="multiclass", num_classes=3)
    with pytest.raises(
        ConfigError, match=r"train\.loss: 'dice_ce' is not a loss for classification"
    ):
        build_loss(spec, name="dice_ce")


def test_unknown_class_weights_are_refused():
    spec = spec_of(task="classification", labels="multiclass", num_classes=3)
    with pytest.raises(ConfigError, match="did you mean 'balanced'"):
        build_loss(spec, class_weights="balance")


@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("labels", ["binary", "multiclass"])
def test_balanced_weights_go_where_the_logits_are(task, labels):
    spec = spec_of(task=task, labels=labels, num_classes=1 if labels == "binary" else 3)
    shape = (2,) if task == "classification" else (2, 8, 8)
    logits = torch.zeros(2, spec.num_classes, *shape[1:], device="meta")
    target = torch.zeros(shape, dtype=torch.long, device="meta")
    loss = build_loss(spec, name="cross_entropy", class_weights="balanced")
    assert loss(logits, target).is_meta
