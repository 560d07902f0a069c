import pytest
import torch
from torch import nn
from toy_world import TinyClassifier, TinyUNet, make_batch, make_context

from medlite.compression.distillation import Distillation
from medlite.compression.ensemble import Ensemble
from medlite.errors import ConfigError, MedliteError


class Says(nn.Module):
    """Always the same logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image):
        return self.logits


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("labels", ["binary", "multiclass", "multilabel"])
def test_softened_logits_of_an_ensemble_are_the_mean_of_softened_probabilities(labels, temperature):
    torch.manual_seed(0)
    said = 5 * torch.randn(3, 2, 4, 6, 6)
    soften = (lambda x: x.softmax(1)) if labels == "multiclass" else torch.sigmoid
    mean = torch.stack([soften(each / temperature) for each in said]).mean(0)
    ensemble = Ensemble([Says(each) for each in said], labels=labels).at(temperature)
    assert torch.allclose(soften(ensemble(None) / temperature), mean, atol=1e-6)


def test_an_ensemble_of_one_says_what_it_says():
    logits = torch.randn(2, 3)
    one = Ensemble([Says(logits)], labels="multiclass")(None)
    assert torch.allclose(one.softmax(1), logits.softmax(1))
    assert torch.allclose(Ensemble([Says(logits)], labels="binary")(None), logits, atol=1e-6)


def test_sure_members_stay_finite():
    said = torch.tensor([[200.0, -200.0]])
    for labels in ("binary", "multiclass"):
        assert Ensemble([Says(said), Says(-said)], labels=labels)(None).isfinite().all()


def test_a_student_learns_from_the_mean_of_softened_probabilities(classes):
    said = [torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0]])]
    teacher = Ensemble([Says(each.expand(2, 3)) for each in said], labels="multiclass")
    context = make_context(classes, teacher=teacher, steps=0)
    step = Distillation(epochs=1, learning_rate=1e-3, alpha=1.0, temperature=2.0)
    step.apply(TinyClassifier(), context)
    batch = make_batch(classes, 2)
    logits = torch.randn(2, 3)
    value = context.fit.hooks.loss(logits, batch, lambda _: torch.zeros(()))
    mean = sum((each / 2).softmax(1) for each in said) / 2
    expected = 4 * (mean * (mean.log() - (logits / 2).log_softmax(1))).sum(1).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert "teacher Says and Says" in context.report.lines["distillation"]


def test_the_first_member_teaches_by_its_maps(classes):
    members = [TinyClassifier(16), TinyClassifier(8)]
    context = make_context(classes, teacher=Ensemble(members, labels="multiclass"), steps=1)
    Distillation(epochs=1, learning_rate=1e-3, feature_weight=1.0).apply(TinyClassifier(8), context)
    assert context.fit.hooks.auxiliary.adapters[0].out_channels == 32


def test_a_member_of_another_task_is_refused(classes):
    teacher = Ensemble([TinyClassifier(), TinyUNet()], labels="multiclass")
    with pytest.raises(MedliteError, match=r"TinyUNet gives logits of \(1, 32, 32\)"):
        Distillation(epochs=1, learning_rate=1e-3).apply(
            TinyClassifier(), make_context(classes, teacher=teacher)
        )


@pytest.mark.parametrize("teacher", ["", [], ["unet", 3]])
def test_what_is_no_name_is_refused(teacher):
    with pytest.raises(ConfigError, match="is not a name or a list of names"):
        Distillation(epochs=1, learning_rate=1e-3, teacher=teacher)


def test_several_teachers_of_maps_alone_are_refused():
    with pytest.raises(ConfigError, match=r"teacher: \['a', 'b'\] is not needed with alpha=0"):
        Distillation(epochs=1, learning_rate=1e-3, teacher=["a", "b"], alpha=0.0)
