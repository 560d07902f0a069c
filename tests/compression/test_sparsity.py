import copy
import gzip
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from toy_world import TinyClassifier, TinyUNet, make_batch, make_context, make_spec

from medlite.compression.pruning import StructuredPruning
from medlite.compression.sparse_layers import find_ends, find_layers
from medlite.compression.sparsity import MaskRamp, Sparsity, prune_by_magnitude
from medlite.compression.weight_masks import hold_masks, mask_of_blocks, masks_of_each
from medlite.data.module import ImageDataModule
from medlite.data.phantom import phantom
from medlite.errors import ConfigError, MedliteError
from medlite.models.layers.mamba import MambaBlock
from medlite.tasks.fit import fit
from medlite.tasks.supervised import SupervisedTask
from medlite.types import TrainSettings

STEP = Sparsity(epochs=2, learning_rate=1e-3, sparsity=0.6)
TWO_OF_FOUR = Sparsity(epochs=1, learning_rate=1e-3, pattern="2:4")


class SmallScan(nn.Module):
    """A state-space layer between convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.mixer = MambaBlock(8, d_state=4)
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, image):
        features = self.stem(image)
        tokens = self.mixer(features.flatten(2).transpose(1, 2))
        return self.head(tokens.transpose(1, 2).reshape(features.shape))


class Small3d(nn.Sequential):
    """Grouped, depth-wise and transposed convolutions of volumes."""

    def __init__(self):
        super().__init__(
            nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU(),
            nn.Conv3d(8, 8, 2, stride=2, groups=2), nn.Conv3d(8, 8, 3, padding=1, groups=8),
            nn.ReLU(), nn.ConvTranspose3d(8, 8, 2, stride=2, groups=2), nn.Conv3d(8, 1, 1),
        )  # fmt: skip


class SharedBlocks(nn.Module):
    """One module at two places, used twice, and one weight in two modules."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.block
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 8, 1)
        self.right.weight = self.left.weight
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, image):
        features = F.relu(self.alias(F.relu(self.block(self.stem(image)))))
        return self.head(self.left(features) + self.right(features).tanh())


NETS = {
    "unet": (TinyUNet, make_spec()),
    "classifier": (TinyClassifier, make_spec("classification", "multiclass", num_classes=3)),
    "volumes": (Small3d, make_spec(image_size=(8, 8, 4))),
    "state_space": (SmallScan, make_spec(image_size=(8, 8))),
    "shared": (SharedBlocks, make_spec()),
}


def weights_of(net, layers=None):
    names = find_layers(net) if layers is None else layers
    return {name: net.get_submodule(name).weight for name in names}


def share_of_zeros(net, layers):
    flat = torch.cat([weight.flatten() for weight in weights_of(net, layers).values()])
    return (flat == 0).float().mean().item()


def inner_layers(net, spec):
    layers = find_layers(net)
    first, last = find_ends(net, layers, spec.input_shape)
    return {name: layer for name, layer in layers.items() if name not in first | last}


@cache
def inner_layers_of(name):
    build, spec = NETS[name]
    return inner_layers(build(), spec)


def with_fit(context, fit):
    context.fit = fit
    return context


def frozen(context):
    return with_fit(context, lambda net, **_: net.eval())


@pytest.mark.parametrize("schedule", ["one_shot", "gradual"])
@pytest.mark.parametrize("name", NETS)
def test_the_result_is_the_same_net_with_zeros_and_restores_exactly(name, schedule):
    build, spec = NETS[name]
    torch.manual_seed(0)
    net = build().eval()
    before = copy.deepcopy(net.state_dict())
    context = make_context(spec, steps=1)
    step = replace(STEP, schedule=schedule)
    sparse, state = step.apply(net, context)

    layers = inner_layers_of(name)
    total = sum(weight.numel() for weight in weights_of(net, layers).values())
    assert share_of_zeros(sparse, layers) * total == pytest.approx(round(0.6 * total), abs=1e-2)
    assert list(sparse.state_dict()) == list(before)
    assert [type(m) for m in sparse.modules()] == [type(m) for m in net.modules()]
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())

    restored = step.restore(build(), state, spec)
    restored.load_state_dict(sparse.state_dict(), strict=True)
    image = make_batch(spec, 2).image
    assert (restored.eval()(image) - sparse(image)).abs().max().item() == 0.0
    assert not torch.equal(sparse(image), net(image))


@pytest.mark.parametrize("name", NETS)
def test_everything_but_the_chosen_weights_keeps_all_its_values(name):
    build, spec = NETS[name]
    torch.manual_seed(0)
    net = build().eval()
    sparse, _ = STEP.apply(net, frozen(make_context(spec)))
    chosen = {f"{path}.weight" for layer in inner_layers_of(name).values() for path in layer.paths}
    old, new = net.state_dict(), sparse.state_dict()
    assert all(torch.equal(new[key], old[key]) for key in old if key not in chosen)
    assert all(((new[key] == old[key]) | (new[key] == 0)).all() for key in chosen)
    assert not any(torch.signbit(new[key][new[key] == 0]).any() for key in chosen)


@pytest.mark.parametrize("build", [TinyUNet, Small3d, SmallScan])
def test_one_shot_pruning_is_that_of_torch(build):
    torch.manual_seed(0)
    net = build()
    sparse = prune_by_magnitude(net, 0.7)
    expected = copy.deepcopy(net)
    kinds = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d
    places = [(module, "weight") for module in expected.modules() if isinstance(module, kinds)]
    prune.global_unstructured(places, pruning_method=prune.L1Unstructured, amount=0.7)
    for module, _ in places:
        prune.remove(module, "weight")
    expected = expected.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in sparse.state_dict().items())


def test_nothing_is_pruned_at_sparsity_zero():
    net = TinyUNet()
    sparse = prune_by_magnitude(net, 0.0).state_dict()
    assert all(torch.equal(tensor, sparse[key]) for key, tensor in net.state_dict().items())


def test_every_layer_loses_the_same_share_of_its_own():
    scores = {"large": 10 + torch.rand(4, 5), "small": torch.rand(10, 1)}
    masks = masks_of_each(scores, 0.4)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"large": 8, "small": 4}
    for name, mask in masks.items():
        assert scores[name][~mask].max() < scores[name][mask].min()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(8, 3),
        nn.Conv2d(8, 3, 3),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.Conv3d(4, 2, 2),
        nn.ConvTranspose2d(8, 3, 2),
        nn.ConvTranspose2d(8, 6, 2, groups=2),
    ],
    ids=str,
)
def test_two_of_four_input_weights_of_an_output_stay_and_they_are_the_largest(layer):
    place = find_layers(layer)[""]
    mask = mask_of_blocks(
        layer.weight.detach().abs(), num_kept=2, block_size=4, axis=place.input_axis
    )
    groups = getattr(layer, "groups", 1)
    is_transposed = isinstance(layer, nn.ConvTranspose2d)
    num_outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert place.num_inputs % 4 == 0
    for output in range(num_outputs):
        if is_transposed:  # rows of (I, O/g, k, k) that feed this output
            group, column = divmod(output, num_outputs // groups)
            rows = slice(group * place.num_inputs, (group + 1) * place.num_inputs)
            weight, kept = layer.weight[rows, column], mask[rows, column]
        else:
            weight, kept = layer.weight[output], mask[output]
        weight, kept = (some.reshape(len(some), -1) for some in (weight, kept))
        for start in range(0, place.num_inputs, 4):
            for tap in range(weight.shape[1]):
                block = weight[start : start + 4, tap].abs().tolist()
                largest = sorted(range(4), key=block.__getitem__)[2:]
                chosen = kept[start : start + 4, tap].nonzero().flatten().tolist()
                assert chosen == sorted(largest)


def test_layers_that_m_does_not_divide_are_left_alone_and_named(spec):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1),
    ).eval()  # fmt: skip
    context = make_context(spec, steps=1)
    sparse, _ = TWO_OF_FOUR.apply(net, context)
    zeros = [(layer.weight == 0).float().mean().item() for layer in sparse]
    assert zeros == [0.0, 0.0, 0.0, 0.5, 0.0]
    assert set(context.report.lines["left without zeros"].split("; ")) == {
        "sees the image: 0",
        "gives the logits: 4",
        "input channels not divisible by 4: 1, 2",
    }
    assert context.report.lines["zeros by layer"] == "3 50.0%"


def test_weights_are_zero_in_every_forward_pass_of_the_training(spec):
    net = TinyUNet()
    seen = []
    context = make_context(spec)
    inner = inner_layers(net, spec)
    fit_toy = context.fit

    def watched(held, **options):
        handle = held.register_forward_hook(lambda *_: seen.append(share_of_zeros(held, inner)))
        result = fit_toy(held, **options)
        handle.remove()
        return result

    context.fit = watched
    STEP.apply(net, context)
    assert seen == pytest.approx([0.6] * (2 * (4 + 1)), abs=1e-4)


def test_training_learns_with_the_weights_that_are_left(trained_unet, spec):
    step = replace(STEP, sparsity=0.8, epochs=6, learning_rate=1e-2)
    sparse, _ = step.apply(trained_unet, make_context(spec))
    batch = make_batch(spec, 32, seed=60)
    is_inside = sparse(batch.image)[:, 0] > 0
    assert (is_inside == (batch.target > 0)).float().mean() > 0.97


def test_the_gradual_schedule_is_cubic_and_evaluates_at_its_end(spec):
    step = replace(STEP, schedule="gradual", epochs=5, ramp_until=0.8)
    net = TinyUNet()
    inner = inner_layers(net, spec)
    context = make_context(spec, steps=1)
    fit_toy, seen = context.fit, {True: [], False: []}

    def watched(held, **options):
        held.register_forward_hook(
            lambda *_: seen[held.training].append(share_of_zeros(held, inner))
        )
        return fit_toy(held, **options)

    context.fit = watched
    step.apply(net, context)
    expected = [0.6 * (1 - (1 - epoch / 4) ** 3) for epoch in (1, 2, 3, 4, 4)]
    assert seen[True] == pytest.approx(expected, abs=1e-3)
    assert seen[False] == pytest.approx([0.6] * 5, abs=1e-4)


@pytest.mark.parametrize("num_epochs", [2, 3, 4])
@pytest.mark.parametrize("ramp_until", [0.5, 0.8, 1.0])
def test_the_last_epoch_that_a_budget_leaves_trains_the_final_sparsity(
    spec, num_epochs, ramp_until
):
    net, seen = TinyUNet(), []
    inner = inner_layers(net, spec)

    def short(held, *, hooks, **_):
        for epoch in range(num_epochs):
            hooks.set_mode(held, True)
            hooks.on_epoch_start(held, epoch / num_epochs)
            seen.append(share_of_zeros(held, inner))
            hooks.set_mode(held, False)
        return held.eval()

    step = replace(STEP, schedule="gradual", epochs=20, ramp_until=ramp_until)
    step.apply(net, with_fit(make_context(spec), short))
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.6, abs=1e-4)


def test_a_resumed_fit_of_fewer_epochs_has_the_masks_of_a_whole_one():
    step = replace(STEP, schedule="gradual", epochs=20, ramp_until=1.0)
    net = TinyUNet()
    layers = find_layers(net)
    hold_masks(net, layers, {name: w.bool() for name, w in weights_of(net, layers).items()})
    whole, killed, resumed = (MaskRamp(step=step, layers=layers) for _ in range(3))
    for epoch in range(3):
        whole.on_epoch_start(net, epoch / 4)
    for epoch in range(2):
        killed.on_epoch_start(net, epoch / 4)
    resumed.hooks().auxiliary.load_state_dict(killed.hooks().auxiliary.state_dict())
    resumed.on_epoch_start(net, 0.5)
    assert resumed.progress == whole.progress == 0.75


def test_a_fit_that_stops_early_ends_at_the_final_sparsity_too(spec):
    def first_epoch(held, *, hooks, **_):
        hooks.on_epoch_start(held, 0.0)
        return held.eval()

    net = TinyUNet()
    step = replace(STEP, schedule="gradual", epochs=9)
    sparse, _ = step.apply(net, with_fit(make_context(spec), first_epoch))
    assert share_of_zeros(sparse, inner_layers(net, spec)) == pytest.approx(0.6, abs=1e-4)


def test_the_scope_of_a_layer_takes_the_same_share_of_each(spec):
    context = frozen(make_context(spec))
    sparse, _ = replace(STEP, scope="layer").apply(TinyUNet(), context)
    shares = [share_of_zeros(sparse, [name]) for name in ("down.1.0", "merge.0", "refine.0")]
    assert shares == pytest.approx([0.6] * 3, abs=1e-3)


def test_blocks_get_their_zeros_one_by_one(spec):
    step = replace(TWO_OF_FOUR, pattern="1:4", sparsity=0.75, schedule="gradual")
    net = TinyUNet()
    layers = inner_layers(net, spec)
    scores = {name: weight.detach().abs() for name, weight in weights_of(net, layers).items()}
    shares = [
        1 - step.masks_at(progress, scores, layers)["refine.0"].float().mean().item()
        for progress in (0.0, 0.1, 0.3, 1.0)
    ]
    assert shares == [0.0, 0.25, 0.5, 0.75]


def test_taylor_takes_the_weights_that_change_the_loss_least(classes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(1024, 3)).eval()
    step = replace(STEP, criterion="taylor", criterion_batches=2, keep_first=False, keep_last=False)
    context = frozen(make_context(classes))
    sparse, _ = step.apply(net, context)

    weight, gradient = net[1].weight.detach().double(), 0.0  # softmax regression, closed form
    for image, target, _ in context.calibration_batches(2):
        pixels = image.flatten(1).double()
        error = (pixels @ weight.T + net[1].bias).softmax(1) - F.one_hot(target, 3)
        gradient = gradient + error.T @ pixels / len(pixels)
    scores = (weight * gradient).abs().flatten()
    expected = scores.argsort()[: round(0.6 * 3072)].sort().values
    assert torch.equal((sparse[1].weight.flatten() == 0).nonzero().flatten(), expected)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_ends_are_found_in_the_graph(spec):
    class TwoStems(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(8, 1, 1)
            self.body = nn.Linear(8, 8)
            self.late = nn.Conv2d(1, 8, 1)
            self.early = nn.Conv2d(1, 8, 1)
            self.side = nn.Linear(8, 1)

        def forward(self, image):
            tokens = self.early(image).movedim(1, -1)
            tokens = tokens @ self.body.weight.T  # read, not called
            features = tokens.movedim(-1, 1) + self.late(image)
            side = features.movedim(1, -1) @ self.side.weight.T
            return self.head(features) + side.movedim(-1, 1)

    net = TwoStems()
    first, last = find_ends(net, find_layers(net), spec.input_shape)
    assert first == {"early", "late"}
    assert last == {"head", "side"}


def test_a_weight_that_an_embedding_reads_too_is_no_layer():
    net = nn.ModuleDict({"words": nn.Embedding(5, 4), "logits": nn.Linear(4, 5)})
    net["logits"].weight = net["words"].weight
    net["other"] = nn.Linear(4, 4)
    assert list(find_layers(net)) == ["other"]


def test_it_follows_structured_pruning(trained_unet, spec):
    narrow, structure = StructuredPruning(
        epochs=1, learning_rate=1e-3, importance="magnitude", round_to=4
    ).apply(trained_unet, make_context(spec, steps=1))
    sparse, _ = TWO_OF_FOUR.apply(narrow, make_context(spec, steps=1))
    for name in ("down.1.0", "merge.0", "refine.0"):
        assert share_of_zeros(sparse, [name]) == 0.5
    assert {k: v.shape for k, v in sparse.state_dict().items()} == {
        k: v.shape for k, v in narrow.state_dict().items()
    }
    assert structure["shapes"]


def test_the_card_says_what_is_zero_and_what_it_saves(spec):
    torch.manual_seed(0)
    net, context = TinyUNet().eval(), frozen(make_context(spec))
    sparse, _ = STEP.apply(net, context)
    lines = context.report.lines
    inner = inner_layers(net, spec)
    num_zeros = sum(int((w == 0).sum()) for w in weights_of(sparse, inner).values())
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    assert "unstructured, global, by magnitude, one shot: 60.0% of the" in lines["sparsity"]
    assert f"{num_zeros / num_parameters:.1%} of all {num_parameters:,}" in lines["sparsity"]
    refine = (sparse.refine[0].weight == 0).float().mean()
    assert f"refine.0 {refine:.1%}" in lines["zeros by layer"]
    assert "sees the image: stem.0" in lines["left without zeros"]
    assert "gives the logits: head" in lines["left without zeros"]

    def size(some):
        values = [t.detach().numpy().tobytes() for t in (*some.parameters(), *some.buffers())]
        return len(gzip.compress(b"".join(values), mtime=0))

    practice = lines["sparsity in practice"]
    assert f"(ratio {size(sparse) / size(net):.2f})" in practice
    assert size(sparse) < 0.75 * size(net)
    assert "ONNX Runtime, OpenVINO) run no faster" in practice
    assert "take pattern 2:4 only" in practice


def test_the_card_names_layers_without_any_weight_left(spec):
    net = TinyUNet().eval()
    with torch.no_grad():
        net.refine[0].weight *= 1e-4
    context = frozen(make_context(spec))
    STEP.apply(net, context)
    assert "without any weight left: refine.0" in context.report.lines["sparsity"]


def test_the_card_counts_zeros_as_deployed(spec):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 1)
            self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.head = nn.Conv2d(8, 1, 1)

        def forward(self, image):
            features = self.stem(image)
            return self.head(self.left(features) + self.right(features))

        def deploy(self):
            merged = nn.Conv2d(8, 8, 1)
            merged.weight = nn.Parameter(self.left.weight + self.right.weight)
            return nn.Sequential(self.stem, merged, self.head)

    torch.manual_seed(0)
    context = frozen(make_context(spec))
    sparse, _ = STEP.apply(Branches(), context)
    zeros = ((sparse.left.weight == 0) & (sparse.right.weight == 0)).sum().item()
    text = f"re-parameterised for deployment {zeros / 80:.1%} of 80 weights"
    assert text in context.report.lines["sparsity"]


class KilledError(Exception):
    """Stands for a kill in mid-training."""


@dataclass
class RealFit:
    """The pipeline's own fit of a small net, which may be killed at a share of the epochs."""

    directory: Path
    ema_decay: float | None = None
    kill_at: float | None = None

    def __post_init__(self):
        images = phantom(
            task="segmentation", labels="binary", image_size=(16, 16),
            num_train=16, num_val=8, num_test=8,
        )  # fmt: skip
        self.data = ImageDataModule(images, batch_size=8, augment=True, seed=0, num_workers=0)

    def apply(self, step):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(self.data.spec.in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1),
        )  # fmt: skip
        return step.apply(net, with_fit(make_context(self.data.spec), self))[0]

    def __call__(self, net, *, name, epochs, learning_rate, hooks):
        def on_epoch_start(net, done):
            if self.kill_at is not None and done >= self.kill_at:
                raise KilledError
            if hooks.on_epoch_start is not None:
                hooks.on_epoch_start(net, done)

        self.settings = TrainSettings(
            epochs=epochs,
            learning_rate=learning_rate,
            ema_decay=self.ema_decay,
            accelerator="cpu",
        )
        result = fit(
            net,
            spec=self.data.spec,
            data=self.data,
            directory=self.directory / name,
            seed=3,
            hooks=replace(hooks, on_epoch_start=on_epoch_start),
            settings=self.settings,
        )
        self.history = result.history
        return result.net


ANY_LAYER = replace(STEP, epochs=3, learning_rate=1e-2, keep_first=False, keep_last=False)


@pytest.mark.parametrize(
    ("schedule", "ema_decay"), [("one_shot", None), ("one_shot", 0.9), ("gradual", None)]
)
def test_a_killed_training_goes_on_and_ends_in_the_same_zeros(tmp_path, schedule, ema_decay):
    step = replace(ANY_LAYER, schedule=schedule, ramp_until=1.0)
    whole = RealFit(tmp_path / "whole", ema_decay).apply(step)
    with pytest.raises(KilledError):
        RealFit(tmp_path / "killed", ema_decay, kill_at=0.5).apply(step)
    resumed = RealFit(tmp_path / "killed", ema_decay).apply(step)
    assert share_of_zeros(whole, find_layers(whole)) == pytest.approx(0.6, abs=1e-3)
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("learning_rate", [1e-2, 1.0])
def test_the_gradual_result_is_the_net_that_validation_judged_best(tmp_path, learning_rate):
    step = replace(ANY_LAYER, schedule="gradual", ramp_until=1.0, learning_rate=learning_rate)
    run = RealFit(tmp_path)
    sparse = run.apply(step)
    task = SupervisedTask(sparse, spec=run.data.spec, settings=run.settings)
    (batch,) = run.data.val_dataloader()
    best = max(run.history, key=lambda row: row[task.monitor])
    loss = task.loss(sparse(batch.image), batch.target).item()
    assert loss == pytest.approx(best["val/loss"], rel=1e-5)


def test_weights_that_are_zero_get_no_gradient():
    layer = nn.Linear(4, 2)
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    hold_masks(layer, find_layers(layer), {"": mask})
    layer(torch.ones(1, 4)).sum().backward()
    assert torch.equal(layer.parametrizations.weight.original.grad, mask.float())


def test_a_net_without_such_layers_is_refused(spec):
    net = nn.Sequential(nn.BatchNorm2d(1))
    with pytest.raises(
        MedliteError, match="nothing could become zero in Sequential: none of its 0"
    ):
        STEP.apply(net, make_context(spec))
    with pytest.raises(MedliteError, match="Sequential has no linear or convolutional layer"):
        prune_by_magnitude(net, 0.5)


def test_a_net_of_protected_layers_is_refused_with_the_reason(spec):
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1))
    message = r"none of its 2 .*gives the logits: 1; sees the image: 0; see keep_first"
    with pytest.raises(MedliteError, match=message):
        STEP.apply(net, make_context(spec))


def test_a_share_of_less_than_one_weight_is_refused(spec):
    step = replace(STEP, sparsity=0.001, keep_first=False, keep_last=False)
    with pytest.raises(MedliteError, match=r"too small for sparsity 0.001; raise sparsity"):
        step.apply(nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)), make_context(spec))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity: 1.0 is not in \(0, 1\)"),
        ({"pattern": "4:2"}, "pattern: '4:2' is not unstructured or N:M with 0 < N < M"),
        ({"pattern": 124}, "pattern: 124 is not .* such as '2:4' .a yaml needs the quotes."),
        ({"pattern": "1:4"}, "sparsity: 0.5 is not 0.75, the share of zeros in pattern 1:4"),
        ({"scope": "net"}, "scope: 'net' is not global or layer"),
        ({"schedule": "slow"}, "schedule: 'slow' is not one_shot or gradual"),
        ({"criterion": "luck"}, "criterion: 'luck' is not magnitude, or taylor"),
        (
            {"criterion": "taylor", "schedule": "gradual"},
            "criterion: 'taylor' is not magnitude, or taylor with schedule=one_shot",
        ),
        ({"criterion_batches": 0}, "criterion_batches: 0 is not a whole number from 1 up"),
        ({"ramp_until": 0.0}, r"ramp_until: 0.0 is not in \(0, 1\]"),
        ({"epochs": 0, "scope": "net"}, "has 2 errors"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Sparsity(**({"epochs": 1, "learning_rate": 1e-3} | options))


def test_wrong_sparsity_of_one_shot_pruning_is_refused():
    with pytest.raises(ConfigError, match=r"sparsity: 1 is not in \[0, 1\)"):
        prune_by_magnitude(TinyUNet(), 1)
