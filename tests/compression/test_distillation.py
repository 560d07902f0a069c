import copy

import pytest
import torch
from torch import nn
from toy_world import TinyClassifier, TinyUNet, make_batch, make_context, make_spec, train

from medlite.compression.distillation import Distillation
from medlite.compression.feature_maps import deepest_features, tapped
from medlite.compression.feature_matching import FeatureMatching
from medlite.compression.teacher_divergence import hard_divergence, softened_divergence
from medlite.errors import ConfigError, MedliteError
from medlite.models.timm_classifier import TimmClassifier


class ConstantTeacher(nn.Module):
    """Always the same class probabilities."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, image):
        return self.logits.expand(len(image), -1)


def bernoulli_divergence(p, q):
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def test_multiclass_divergence_is_its_definition():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3, dtype=float), torch.randn(5, 3, dtype=float)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    value = softened_divergence(student, teacher, temperature=3.0, labels="multiclass")
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("labels", ["binary", "multilabel"])
def test_divergence_of_sigmoids_is_its_definition(labels):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 2, dtype=float), torch.randn(5, 2, dtype=float)
    p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
    expected = 4 * bernoulli_divergence(p, q).mean()
    value = softened_divergence(student, teacher, temperature=2.0, labels=labels)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("labels", ["binary", "multiclass"])
def test_equal_logits_diverge_by_nothing(labels):
    logits = torch.randn(2, 3, 4, 4)
    value = softened_divergence(logits, logits.clone(), temperature=2.0, labels=labels)
    assert value.abs().item() < 1e-6


def test_dense_divergence_is_the_mean_over_pixels():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    pixels = [net.permute(0, 2, 3, 1).reshape(-1, 3) for net in (student, teacher)]
    dense = softened_divergence(student, teacher, temperature=2.0, labels="multiclass")
    flat = softened_divergence(*pixels, temperature=2.0, labels="multiclass")
    assert torch.allclose(dense, flat)


def test_hard_divergence_is_the_cross_entropy_with_the_decision_of_the_teacher():
    logits, teacher = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.1, 0.0, 3.0]])
    expected = -(logits.exp() / logits.exp().sum())[0, 2].log()
    assert torch.allclose(hard_divergence(logits, teacher, labels="multiclass"), expected)
    p, q = logits.sigmoid()[0, :2]
    expected = -(p.log() + (1 - q).log()) / 2
    binary = hard_divergence(logits[:, :2], torch.tensor([[0.1, -1.0]]), labels="multilabel")
    assert torch.allclose(binary, expected)


class TwoHeads(nn.Module):
    """A classifier with a distillation token in short: two heads on one feature."""

    distillation_heads = ("head", "head_dist")

    def __init__(self):
        super().__init__()
        self.head, self.head_dist = nn.Linear(1, 3), nn.Linear(1, 3)

    def forward(self, image):
        mean = image.mean((2, 3))
        return (self.head(mean) + self.head_dist(mean)) / 2


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_token_hears_the_teacher_and_the_other_head_the_labels(classes, kind):
    """A teacher that always says class 2, which the labels mostly do not."""
    torch.manual_seed(0)
    teacher = ConstantTeacher([0.01, 0.01, 0.98])
    step = Distillation(epochs=30, learning_rate=3e-2, kind=kind, temperature=1.0)
    distilled, _ = step.apply(TwoHeads(), make_context(classes, teacher=teacher))
    batch = make_batch(classes, 32, seed=3)
    mean = batch.image.mean((2, 3))
    with torch.no_grad():
        taught, labelled = distilled.head_dist(mean).softmax(1), distilled.head(mean).softmax(1)
    assert taught[:, 2].min() > 0.9
    share = (batch.target == 2).float().mean()
    assert (labelled[:, 2].mean() - share).abs() < 0.25


def test_deit_names_its_heads_and_learns_through_both(classes):
    net = TimmClassifier(
        in_channels=1, num_classes=3, name="deit_tiny_distilled_patch16_224",
        image_size=(32, 32), depth=1, embed_dim=24, num_heads=2,
    )  # fmt: skip
    assert net.distillation_heads == ("net.head", "net.head_dist")
    step = Distillation(epochs=1, learning_rate=1e-3, kind="hard")
    teacher = ConstantTeacher([0.2, 0.3, 0.5])
    distilled, _ = step.apply(net, make_context(classes, teacher=teacher))
    for head in net.distillation_heads:
        before, after = net.get_submodule(head), distilled.get_submodule(head)
        assert not torch.equal(before.weight, after.weight)


def test_a_net_with_one_head_has_no_token():
    net = TimmClassifier(in_channels=1, num_classes=3, name="resnet10t")
    assert net.distillation_heads is None


def test_a_student_comes_closer_to_its_teacher(classes):
    student = train(TinyClassifier(), classes, epochs=2)
    teacher = ConstantTeacher([0.2, 0.3, 0.5])
    image = make_batch(classes, 16, seed=5).image
    targets = teacher(image).detach()

    def divergence(net):
        return softened_divergence(
            net.eval()(image), targets, temperature=1.0, labels="multiclass"
        ).item()

    step = Distillation(epochs=8, learning_rate=1e-2, alpha=1.0)
    distilled, state = step.apply(student, make_context(classes, teacher=teacher))
    assert divergence(distilled) < 0.1 * divergence(student)
    assert state == {}


def test_a_vanishing_alpha_is_ordinary_training(classes):
    start = train(TinyClassifier(), classes, epochs=1)
    teacher = ConstantTeacher([0.2, 0.3, 0.5])
    step = Distillation(epochs=1, learning_rate=1e-3, alpha=1e-9)
    distilled, _ = step.apply(start, make_context(classes, teacher=teacher))
    trained = make_context(classes).fit(
        copy.deepcopy(start), name="plain", epochs=1, learning_rate=1e-3
    )
    image = make_batch(classes, 4).image
    assert torch.allclose(distilled.eval()(image), trained.eval()(image), atol=1e-5)


def test_the_teacher_learns_nothing_and_is_not_kept(classes):
    student, teacher = TinyClassifier(8), TinyClassifier(16)
    before = copy.deepcopy(teacher.state_dict())
    context = make_context(classes, teacher=teacher)
    step = Distillation(epochs=1, learning_rate=1e-2, feature_weight=1.0)
    distilled, _ = step.apply(student, context)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert distilled.state_dict().keys() == student.state_dict().keys()
    assert "adapters.0.weight" in context.fit.hooks.auxiliary.state_dict()


def test_adapters_are_trained_beside_the_student(classes):
    context = make_context(classes, teacher=TinyClassifier(16))
    weights = []
    fit = context.fit

    def watched(net, *, hooks, **options):
        weights.append(copy.deepcopy(hooks.auxiliary.state_dict()))
        return fit(net, hooks=hooks, **options)

    context.fit = watched
    Distillation(epochs=1, learning_rate=1e-2, feature_weight=1.0).apply(TinyClassifier(8), context)
    after = fit.hooks.auxiliary.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in weights[0].items())


def test_hooks_are_removed_even_after_an_error(classes):
    teacher = TinyClassifier(16)
    context = make_context(classes, teacher=teacher)
    students = []

    def failing_fit(net, **_):
        students.append(net)
        raise KeyboardInterrupt

    context.fit = failing_fit
    step = Distillation(epochs=1, learning_rate=1e-2, feature_weight=1.0)
    with pytest.raises(KeyboardInterrupt):
        step.apply(TinyClassifier(8), context)
    for net in (teacher, students[0]):
        assert not any(module._forward_hooks for module in net.modules())


def test_the_deepest_map_of_a_unet_is_its_bottleneck():
    assert deepest_features(TinyUNet(dropout=0.0).eval(), torch.zeros(2, 1, 32, 32)) == "down"


def test_the_deepest_map_of_a_classifier_is_what_it_pools():
    net = TinyClassifier().eval()
    assert deepest_features(net, torch.zeros(2, 1, 32, 32)) == "features"


def test_features_of_different_widths_and_grids_are_matched():
    student = {"a": torch.randn(2, 4, 8, 8)}
    teacher = {"b": torch.randn(2, 6, 4, 4)}
    distance = FeatureMatching(student, teacher, {"a": "b"})(student, teacher)
    assert 0.0 < distance.item() < 4.0


def test_the_distance_of_features_is_two_minus_two_cosines():
    torch.manual_seed(0)
    student = {"a": torch.randn(2, 3, 4, 4, 4)}
    teacher = {"a": torch.randn(2, 3, 4, 4, 4)}
    matching = FeatureMatching(student, teacher, {"a": "a"})
    with torch.no_grad():
        matching.adapters[0].weight.copy_(torch.eye(3).view(3, 3, 1, 1, 1))
        matching.adapters[0].bias.zero_()
    cosine = torch.cosine_similarity(student["a"], teacher["a"], dim=1)
    assert matching(student, teacher).item() == pytest.approx((2 - 2 * cosine).mean().item())
    assert matching(student, student).item() == pytest.approx(0.0, abs=1e-6)


def test_named_features_are_used(spec):
    context = make_context(spec, teacher=train(TinyUNet(width=24), spec, epochs=1))
    step = Distillation(
        epochs=1, learning_rate=1e-3, feature_weight=0.5, features={"merge": "refine"}
    )
    step.apply(TinyUNet(width=8), context)
    assert context.fit.hooks.auxiliary.adapters[0].weight.shape == (24, 8, 1, 1)
    assert "merge from refine" in context.report.lines["distillation"]


def test_the_net_that_was_given_stays_as_it_was(classes):
    student = TinyClassifier(8)
    before = copy.deepcopy(student.state_dict())
    step = Distillation(epochs=1, learning_rate=1e-2)
    step.apply(student, make_context(classes, teacher=TinyClassifier(16)))
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_restoring_changes_nothing(classes):
    net = TinyClassifier()
    assert Distillation(epochs=1, learning_rate=1e-2).restore(net, {}, classes) is net


def test_a_misspelt_module_is_refused_with_the_right_name():
    with (
        pytest.raises(MedliteError, match=r"no module 'merg', did you mean 'merge'\?"),
        tapped(TinyUNet(), ["merg"], "distill.features"),
    ):
        pass


def test_a_module_without_maps_is_refused(classes):
    step = Distillation(
        epochs=1, learning_rate=1e-3, feature_weight=1.0, features={"head": "features"}
    )
    with pytest.raises(MedliteError, match=r"gives \(2, 3\) instead of maps"):
        step.apply(TinyClassifier(), make_context(classes, teacher=TinyClassifier()))


def test_a_net_without_maps_is_refused(classes):
    student = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 3))
    step = Distillation(epochs=1, learning_rate=1e-3, feature_weight=1.0)
    with pytest.raises(MedliteError, match="no module of Sequential gives a map"):
        step.apply(student, make_context(classes, teacher=TinyClassifier()))


def test_a_teacher_of_another_task_is_refused(classes):
    step = Distillation(epochs=1, learning_rate=1e-3)
    with pytest.raises(MedliteError, match=r"gives logits of \(1, 32, 32\) for an image"):
        step.apply(TinyClassifier(), make_context(classes, teacher=TinyUNet()))


def test_segmentation_is_distilled():
    spec = make_spec()
    teacher = train(TinyUNet(width=16), spec)
    step = Distillation(epochs=6, learning_rate=1e-2, alpha=0.5)
    distilled, _ = step.apply(TinyUNet(width=8), make_context(spec, teacher=teacher))
    batch = make_batch(spec, 16, seed=60)
    is_inside = distilled.eval()(batch.image)[:, 0] > 0
    assert (is_inside == (batch.target > 0)).float().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: 0.0 is not above 0"),
        ({"kind": "medium"}, "kind: 'medium' is not soft or hard"),
        ({"alpha": 2.0}, r"alpha: 2.0 is not in \[0, 1\]"),
        ({"alpha": 0.0}, "alpha: 0.0 is not above 0: .* the teacher would teach nothing"),
        (
            {"features": {"merge": "merge"}},
            r"features: \{'merge': 'merge'\} is not read with feature_weight=0 and rank_weight=0",
        ),
        ({"feature_weight": -1.0}, "feature_weight: -1.0 is not 0 or above"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(**({"epochs": 1, "learning_rate": 1e-3} | options))
