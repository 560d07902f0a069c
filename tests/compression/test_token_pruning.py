"""Token pruning: which tokens stay, what is saved, and which nets are refused."""

import io
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from timm.layers import Attention, DiffAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn
from toy_world import TinyClassifier, TinyUNet, make_batch, make_context, make_spec

from medlite.compression.low_rank import LowRank
from medlite.compression.pruning import StructuredPruning
from medlite.compression.quantization import PostTrainingQuantization
from medlite.compression.token_blocks import TokenDroppingBlock
from medlite.compression.token_pruning import TokenPruning
from medlite.errors import ConfigError, MedliteError
from medlite.export.export import export
from medlite.export.layer_costs import count_layers, total
from medlite.models.apformer import APFormer
from medlite.models.segformer import SegFormer
from medlite.models.timm_classifier import TimmClassifier
from medlite.models.transmed import TransMed
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.types import Hardware

STEP = TokenPruning(epochs=1, learning_rate=1e-3)

SMALL = {
    "img_size": 32, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 48, "depth": 4,
    "num_heads": 3,
}  # fmt: skip
"""64 patches; after blocks 1, 2 and 3 at 0.7 and one merged token: 46, 34, 25"""

vit = partial(VisionTransformer, **SMALL)
shallow = partial(VisionTransformer, **SMALL | {"depth": 2})

NETS = {
    "class token": (vit, 1),
    "distilled": (partial(VisionTransformerDistilled, **SMALL), 2),
    "registers": (partial(vit, reg_tokens=3), 1),
    "average": (partial(vit, class_token=False, global_pool="avg"), None),
    "average beside a class token": (partial(vit, global_pool="avg"), None),
    "average with the class token": (
        partial(vit, global_pool="avg", pool_include_prefix=True),
        None,
    ),
    "attention pooling": (partial(vit, class_token=False, global_pool="map"), None),
    "deit3": (partial(vit, no_embed_class=True, init_values=0.1), 1),
    "dropout": (partial(vit, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1), 1),
    "transmed": (partial(TransMed, in_channels=1, num_classes=3), 1),
}
"""name -> how to build it, and the leading tokens that rank (None: all)"""


def build(name):
    torch.manual_seed(0)
    return NETS[name][0]().eval()


def without_training(spec):
    context = make_context(spec)
    context.fit = lambda net, **_: net
    return context


def thinned(net, spec, **options):
    context = without_training(spec)
    thin, state = replace(STEP, **options).apply(net, context)
    return thin, state, context.report.lines["token pruning"]


def num_macs(net, spec):
    return total(count_layers(net, spec.input_shape)).macs


def saved_and_loaded(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", NETS)
def test_a_net_gets_cheaper_keeps_its_names_and_restores_exactly(name, classes):
    net, image = build(name), make_batch(classes, 2).image
    names, logits = list(net.state_dict()), net(image)
    context = make_context(classes, steps=1)
    thin, state = STEP.apply(net, context)
    assert context.fit.calls == [{"name": "prune_tokens", "epochs": 1, "learning_rate": 1e-3}]
    assert thin.eval()(image).shape == logits.shape
    assert num_macs(thin, classes) < num_macs(net, classes)
    assert sorted(thin.state_dict()) == sorted(names)
    assert state["num_queries"] == NETS[name][1]
    assert torch.equal(net(image), logits)

    state, weights = saved_and_loaded((state, thin.state_dict()))
    restored = STEP.restore(NETS[name][0](), state, classes)
    restored.load_state_dict(weights, strict=True)
    assert (restored.eval()(image) - thin(image)).abs().max().item() == 0.0


def attention_by_loops(block, tokens):
    """(softmax of every head (B, heads, L, L), tokens after the attention), one head at a time."""
    attention, normed = block.attn, block.norm1(tokens)
    size = attention.head_dim
    weights, mixed = [], []
    for head in range(attention.num_heads):
        parts = [
            normed @ attention.qkv.weight[start : start + size].T
            + attention.qkv.bias[start : start + size]
            for start in (head * size + third * tokens.shape[2] for third in range(3))
        ]
        weights.append(torch.softmax(parts[0] @ parts[1].mT / size**0.5, dim=2))
        mixed.append(weights[-1] @ parts[2])
    return torch.stack(weights, 1), tokens + attention.proj(torch.cat(mixed, 2))


@pytest.mark.parametrize("fuses", [True, False])
@pytest.mark.parametrize(("num_prefix", "num_queries"), [(1, 1), (2, 2), (5, 1), (0, None)])
@torch.no_grad()
def test_the_tokens_that_get_most_attention_stay(num_prefix, num_queries, fuses):
    torch.manual_seed(0)
    block = Block(24, 3, qkv_bias=True).eval()
    tokens = torch.randn(3, 20, 24)
    weights, attended = attention_by_loops(block, 3 * tokens)
    rows = []
    for weight, one in zip(weights, attended, strict=True):
        asked = range(20 if num_queries is None else num_queries)
        given = sum(weight[head, query] for head in range(3) for query in asked)
        others = sorted(range(num_prefix, 20), key=lambda place: -given[place].item())
        kept = [*range(num_prefix), *others[:6]]
        merged = sum(given[i] * one[i] for i in others[6:]) / sum(given[i] for i in others[6:])
        rows.append(torch.cat([one[kept], merged[None]]) if fuses else one[kept])
    expected = torch.stack(rows)
    expected = expected + block.mlp(block.norm2(expected))
    dropping = TokenDroppingBlock(
        block, num_prefix=num_prefix, num_kept=6, num_queries=num_queries, fuses=fuses
    )
    assert torch.allclose(dropping(3 * tokens), expected, atol=1e-5)


class Gated(Attention):
    def __init__(self, *args, **options):
        super().__init__(*args, gated=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"init_values": 0.5},
        {"attn_layer": Gated},
        {"qk_norm": True},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
    ],
)
@torch.no_grad()
def test_a_block_that_keeps_all_tokens_is_timms_up_to_their_order(options):
    torch.manual_seed(0)
    block, tokens = Block(24, 3, qkv_bias=True, **options).eval(), torch.randn(2, 9, 24)
    expected = block(tokens)
    dropping = TokenDroppingBlock(block, num_prefix=1, num_kept=8, num_queries=1, fuses=False)
    found = dropping(tokens)
    assert torch.allclose(found[:, 0], expected[:, 0], atol=1e-6)
    by_first = [rows[rows[:, 0].argsort()] for rows in (*found, *expected)]
    assert torch.allclose(torch.stack(by_first[:2]), torch.stack(by_first[2:]), atol=1e-6)


def expected_macs(lengths, *, width, num_ranking, patch_values, fuses=True):
    """A transformer's multiply-adds from the tokens (before, after) of each of its blocks."""
    macs = (lengths[0][0] - 1) * patch_values * width + 3 * width
    for before, after in lengths:
        macs += before * 4 * width**2 + 2 * before**2 * width + after * 8 * width**2
        if after < before:
            macs += num_ranking * before * width + fuses * (before - 1) * width
    return macs


@pytest.mark.parametrize("fuse", [True, False])
def test_multiply_adds_fall_as_the_tokens_do(fuse, classes):
    net = build("class token")
    kept = (65, 47, 35, 26) if fuse else (65, 46, 33, 24)  # 45 + 1 + 1, ...; 0.7 rounded up
    lengths = [(65, 65), *pairwise(kept)]
    costs = {"width": 48, "num_ranking": 1, "patch_values": 16, "fuses": fuse}
    thin, _, _ = thinned(net, classes, fuse=fuse)
    assert num_macs(net, classes) == expected_macs([(65, 65)] * 4, **costs)
    assert num_macs(thin, classes) == expected_macs(lengths, **costs)


def test_vit_tiny_saves_a_third_at_three_blocks():
    spec = make_spec("classification", "multiclass", image_size=(224, 224), num_classes=3)
    net = TimmClassifier(
        in_channels=1, num_classes=3, name="vit_tiny_patch16_224", image_size=(224, 224)
    )
    thin, state, line = thinned(net.eval(), spec)
    assert state["num_kept"] == {3: 138, 6: 98, 9: 70}
    assert "from 197, 140, 100 to 72 tokens in blocks 3, 6, 9 of 12" in line
    lengths = [(197, 197)] * 3 + [(197, 140)] + [(140, 140)] * 2 + [(140, 100)]
    lengths += [(100, 100)] * 2 + [(100, 72)] + [(72, 72)] * 2
    macs = expected_macs(lengths, width=192, num_ranking=1, patch_values=256)
    assert num_macs(thin, spec) == macs
    assert 0.6 < macs / num_macs(net, spec) < 0.67


def test_fractions_do_not_round_a_whole_number_up(classes):
    net = VisionTransformer(**SMALL | {"img_size": 20})
    spec = replace(classes, image_size=(20, 20))
    _, state, _ = thinned(net, spec, keep_ratio=0.28, blocks=[0])  # 0.28 * 25 = 7.000000000000001
    assert state["num_kept"] == {0: 7}


def test_blocks_are_taken_in_their_order(classes):
    _, state, line = thinned(build("class token"), classes, blocks=[2, 0])
    assert list(state["num_kept"].items()) == [(0, 45), (2, 33)]
    assert "in blocks 0, 2 of 4" in line


def test_a_place_with_too_few_tokens_is_named(classes):
    net = VisionTransformer(**SMALL | {"patch_size": 16})  # 4 patches, then 2 and the merged one
    _, state, line = thinned(net, classes, keep_ratio=0.5, blocks=[1, 3])
    assert state["num_kept"] == {1: 2}
    assert line.endswith("too few tokens to drop any in 3")


def test_the_plan_says_what_will_be_done(classes):
    net, context = build("class token"), without_training(classes)
    context.is_dry = True
    STEP.apply(net, context)
    assert context.report.lines["token pruning"] == thinned(net, classes)[2]


class Own(VisionTransformer):
    """A user's net: a subclass of timm's, with blocks of a subclass and a head of its own."""

    class OwnBlock(Block):
        """As timm's."""

    def __init__(self):
        super().__init__(**SMALL, block_fn=self.OwnBlock)
        self.own_head = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, images):
        return self.own_head(self.forward_features(images)[:, 0])


def test_a_users_own_transformer_inside_another_module_works(classes):
    net = nn.Sequential(nn.Identity(), Own()).eval()
    thin, state, _ = thinned(net, classes)
    assert state["path"] == "1"
    assert num_macs(thin, classes) < num_macs(net, classes)


def run_onnx(net, image, directory):
    artifact = export(
        net, format="onnx", input_shape=tuple(image.shape[1:]), directory=directory, stem="net"
    )
    hardware = Hardware(num_threads=1)
    operators = OnnxRuntime().count_operators(artifact, hardware)
    session = OnnxRuntime().load(artifact, hardware)
    return torch.from_numpy(session(image.numpy())), operators


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}])
def test_the_exported_net_drops_the_same_tokens_in_any_batch(options, classes, tmp_path):
    torch.manual_seed(0)
    thin, _, _ = thinned(shallow(**options).eval(), classes, blocks=[0])
    image = make_batch(classes, 5).image
    logits, operators = run_onnx(thin, image, tmp_path)
    with torch.no_grad():
        assert torch.allclose(logits, thin(image), atol=1e-5)
        assert torch.allclose(thin(image[3:4]), thin(image)[3:4], atol=1e-5)
    assert operators["TopK"] == 1


@pytest.mark.slow
def test_it_is_quantised_after_it_and_exported(classes, tmp_path):
    torch.manual_seed(0)
    thin, tokens, _ = thinned(shallow().eval(), classes, blocks=[0])
    step, context = PostTrainingQuantization(calibration_samples=8), make_context(classes)
    quantised, ranges = step.apply(thin, context)
    image = make_batch(classes, 4).image
    restored = step.restore(STEP.restore(shallow().eval(), tokens, classes), ranges, classes)
    restored.load_state_dict(quantised.state_dict(), strict=True)
    assert (restored(image) - quantised(image)).abs().max().item() == 0.0
    logits, operators = run_onnx(quantised, image, tmp_path)
    assert operators["int8:QGemm"] == 8
    assert (logits - quantised(image)).abs().max() < 0.02 * thin(image).abs().max()
    assert (logits - thin(image)).abs().max() < 0.1 * thin(image).abs().max()


def test_channels_are_pruned_after_it_as_without_it(classes):
    torch.manual_seed(0)
    net = shallow().eval()
    step = StructuredPruning(epochs=1, learning_rate=1e-3, importance="magnitude")
    thin, _, _ = thinned(net, classes, blocks=[0])
    pruned, state = step.apply(thin, without_training(classes))
    _, alone = step.apply(net, without_training(classes))
    assert state["shapes"] == alone["shapes"]
    assert state["shapes"]["cls_token"] == [1, 1, 24]

    image = make_batch(classes, 2).image
    restored = step.restore(thin, saved_and_loaded(state), classes)
    restored.load_state_dict(pruned.state_dict(), strict=True)
    assert (restored(image) - pruned(image)).abs().max().item() == 0.0


def test_channels_may_be_pruned_before_it(classes):
    step = StructuredPruning(epochs=1, learning_rate=1e-3, importance="magnitude")
    pruned, _ = step.apply(shallow().eval(), without_training(classes))
    thin, _, _ = thinned(pruned, classes, blocks=[0])
    assert num_macs(thin, classes) < num_macs(pruned, classes)


def test_its_layers_are_factorised_after_it(classes):
    thin, _, _ = thinned(shallow().eval(), classes, blocks=[0])
    _, state = LowRank(epochs=1, learning_rate=1e-3).apply(thin, without_training(classes))
    assert {"blocks.0.mlp.fc1", "blocks.0.attn.qkv"} <= set(state["ranks"])


@pytest.mark.parametrize(
    "net",
    [
        TinyUNet(),
        SegFormer(in_channels=1, num_classes=1),
        APFormer(in_channels=1, num_classes=1, image_size=(32, 32)),
    ],
    ids=lambda net: type(net).__name__,
)
def test_segmentation_is_refused_with_who_can(net, spec):
    message = (
        rf"one answer an image, and {type(net).__name__} gives one for every place.*"
        r"vit_tiny, vit_base, deit_tiny_distilled, transmed_t.*model\.keep_ratio=0\.5"
    )
    with pytest.raises(MedliteError, match=message):
        STEP.apply(net, make_context(spec))


def test_a_net_without_a_transformer_is_refused(classes):
    with pytest.raises(MedliteError, match=r"TinyClassifier has 0\. These models can: vit_tiny"):
        STEP.apply(TinyClassifier(), make_context(classes))


class OwnForward(Block):
    def forward(self, tokens):
        return super().forward(tokens.flip(1))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"block_fn": ResPostBlock}, "ResPostBlock"),
        ({"block_fn": OwnForward}, "OwnForward"),
        ({"attn_layer": DiffAttention, "num_heads": 2}, "Block"),
    ],
)
def test_blocks_of_another_kind_are_refused(options, found, classes):
    message = rf"timm's Block with plain Attention, and VisionTransformer is made of {found}\b"
    with pytest.raises(MedliteError, match=message):
        STEP.apply(vit(**options).eval(), make_context(classes))


class WantsGrid(VisionTransformer):
    def forward(self, images):
        grid = self.forward_features(images)[:, 1:].unflatten(1, (8, 8))
        return self.head(grid.mean((1, 2)))


def test_a_net_that_wants_every_place_back_is_refused(classes):
    with pytest.raises(MedliteError, match="in WantsGrid: what follows its blocks needs a token"):
        STEP.apply(WantsGrid(**SMALL).eval(), make_context(classes))


def test_a_net_with_too_few_tokens_is_refused(classes):
    message = (
        r"no token can go: VisionTransformer has 5 for an image of 32x32, and keep_ratio 0\.7 and "
        r"one merged token leave as many; lower compression\.prune_tokens\.keep_ratio"
    )
    with pytest.raises(MedliteError, match=message):
        STEP.apply(VisionTransformer(**SMALL | {"patch_size": 16}).eval(), make_context(classes))


def test_a_block_that_is_not_there_is_refused(classes):
    message = r"blocks: \[1, 4\] names a block that is not there; the net has 4, from 0 to 3"
    with pytest.raises(ConfigError, match=message):
        replace(STEP, blocks=[1, 4]).apply(build("class token"), make_context(classes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 1.0}, r"keep_ratio: 1\.0 is not in \(0, 1\)"),
        ({"keep_ratio": 0.0}, r"keep_ratio: 0\.0 is not in \(0, 1\)"),
        ({"blocks": []}, r"blocks: \[\] is not null or different numbers of blocks from 0 up"),
        ({"blocks": [-1]}, r"blocks: \[-1\] is not null"),
        ({"blocks": [3, 3]}, r"blocks: \[3, 3\] is not null"),
        ({"epochs": 0}, "epochs: 0 is not a whole number from 1 up"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        replace(STEP, **options)
