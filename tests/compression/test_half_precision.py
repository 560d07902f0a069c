import io
import re

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn
from toy_world import TinyUNet, make_batch, make_context, make_spec, train

from medlite.compression.half_precision import HalfPrecision
from medlite.errors import ConfigError, ExportError, MedliteError
from medlite.export.export import export, export_all
from medlite.models.layers.mamba import MambaBlock
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.runtimes.openvino import OpenVinoRuntime
from medlite.types import Hardware

aten = torch.ops.aten
HARDWARE = Hardware(num_threads=1)
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Mixed(nn.Module):
    """Attention, normalisations, a scan, sums in place, and constants of the network's own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mamba = MambaBlock(8, d_state=4)
        self.group_norm = nn.GroupNorm(2, 8)
        self.head = nn.Conv2d(8, 1, 1)
        self.register_buffer("offset", torch.linspace(-1, 1, 8))

    def forward(self, image):
        features = self.stem(image)
        tokens = self.norm(features.flatten(2).transpose(1, 2)) + self.offset
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens += self.mamba(tokens)
        gate = tokens.exp().mean(1, keepdim=True).softmax(-1)
        tokens = tokens * gate + torch.arange(8, dtype=torch.float32) / 8
        coarse = self.group_norm(tokens.transpose(1, 2).unflatten(2, features.shape[2:]))
        return self.head(nn.functional.interpolate(coarse, scale_factor=4.0, mode="bilinear"))


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    return Mixed().eval()


def relative_difference(logits, expected):
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def types_read(graph, target):
    """The types of the tensors that the operators called `target` read, by running the graph."""
    found = set()

    class Reading(torch.fx.Interpreter):
        def call_function(self, called, args, kwargs):
            if called == target:
                found.update(each.dtype for each in args if isinstance(each, torch.Tensor))
            return super().call_function(called, args, kwargs)

    Reading(graph).run(torch.zeros(2, 1, 32, 32))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 3e-3), ("bfloat16", 3e-2)])
def test_logits_stay_close_and_in_float32(trained_unet, mixed, spec, dtype, tolerance):
    image = make_batch(spec, 8, seed=3).image
    for net in (trained_unet, mixed):
        halved, _ = HalfPrecision(dtype=dtype).apply(net, make_context(spec))
        assert halved(image).dtype == torch.float32
        assert 0 < relative_difference(halved(image), net(image)) < tolerance


@pytest.mark.parametrize("dtype", TYPES)
def test_restored_net_is_the_same_to_the_last_bit(trained_unet, mixed, spec, dtype):
    step = HalfPrecision(dtype=dtype)
    image = make_batch(spec, 4, seed=3).image
    for net, other in ((trained_unet, TinyUNet()), (mixed, Mixed())):
        halved, state = step.apply(net, make_context(spec))
        file = io.BytesIO()
        torch.save((state, halved.state_dict()), file)
        file.seek(0)
        state, weights = torch.load(file, weights_only=True)
        restored = step.restore(other, state, spec)
        restored.load_state_dict(weights, strict=True)
        assert (restored(image) - halved(image)).abs().max().item() == 0.0


@pytest.mark.parametrize("dtype", TYPES)
def test_layers_compute_in_half_and_sensitive_operators_in_float32(mixed, spec, dtype):
    halved, _ = HalfPrecision(dtype=dtype).apply(mixed, make_context(spec))
    for target in (aten.conv2d.default, aten.linear.default, aten.conv1d.default):
        assert types_read(halved, target) == {TYPES[dtype]}, target
    sensitive = (aten.layer_norm.default, aten.group_norm.default, aten.softmax.int)
    scan = torch.ops.medlite.selective_scan.default
    for target in (*sensitive, aten.exp.default, scan):
        assert types_read(halved, target) == {torch.float32}, target


def test_weights_take_half_the_bytes_and_those_of_normalisations_stay(mixed, spec):
    halved, _ = HalfPrecision().apply(mixed, make_context(spec))
    types = {name: tensor.dtype for name, tensor in halved.state_dict().items()}
    assert types["stem.weight"] == types["mamba.in_proj.weight"] == torch.float16
    assert types["norm.weight"] == types["mamba.A_log"] == torch.float32


def test_batch_normalisation_is_folded_first(trained_unet, spec):
    halved, state = HalfPrecision().apply(trained_unet, make_context(spec))
    assert len(state["folds"]) == 4
    assert aten.batch_norm.default not in {node.target for node in halved.graph.nodes}


def test_the_net_that_was_given_stays_as_it_was(trained_unet, spec):
    before = {name: tensor.clone() for name, tensor in trained_unet.state_dict().items()}
    HalfPrecision().apply(trained_unet, make_context(spec))
    after = trained_unet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_batch_size_and_mode_gives_the_same_logits(mixed, spec, batch_size):
    halved, _ = HalfPrecision().apply(mixed, make_context(spec))
    image = make_batch(spec, 8, seed=4).image
    expected = halved.train()(image)[:batch_size]
    assert torch.allclose(halved.eval()(image[:batch_size]), expected, atol=2e-3)


@pytest.mark.slow
def test_runtimes_agree_with_torch(tmp_path, mixed, trained_unet, spec):
    image = make_batch(spec, 4, seed=5).image
    for net in (mixed, trained_unet):
        halved, _ = HalfPrecision().apply(net, make_context(spec))
        artifacts = export_all(
            halved, formats=["onnx", "openvino"], input_shape=spec.input_shape,
            directory=tmp_path, stem="net",
        )  # fmt: skip
        assert TensorProto.FLOAT16 in {
            each.data_type for each in onnx.load(artifacts["onnx"].path).graph.initializer
        }
        for runtime in (OnnxRuntime(), OpenVinoRuntime()):
            artifact = artifacts[runtime.format]
            assert artifact.precision == "fp16"
            logits = torch.from_numpy(runtime.load(artifact, HARDWARE)(image.numpy()))
            assert logits.dtype == torch.float32
            assert relative_difference(logits, halved(image)) < 5e-3


def test_the_file_is_half_as_large(tmp_path):
    torch.manual_seed(0)
    spec = make_spec(image_size=(8, 8))
    net = TinyUNet(width=64).eval()
    halved, _ = HalfPrecision().apply(net, make_context(spec))
    options = {"format": "onnx", "input_shape": spec.input_shape, "directory": tmp_path}
    small, whole = export(halved, **options, stem="a"), export(net, **options, stem="b")
    assert small.num_bytes < 0.52 * whole.num_bytes


def test_bfloat16_runs_on_openvino_and_is_refused_for_onnx_runtime(tmp_path, trained_unet, spec):
    halved, _ = HalfPrecision(dtype="bfloat16").apply(trained_unet, make_context(spec))
    options = {"input_shape": spec.input_shape, "directory": tmp_path, "stem": "net"}
    artifact = export(halved, format="openvino", **options)
    image = make_batch(spec, 4, seed=5).image
    logits = torch.from_numpy(OpenVinoRuntime().load(artifact, HARDWARE)(image.numpy()))
    assert relative_difference(logits, halved(image)) < 0.05
    with pytest.raises(ExportError, match=r"no bfloat16 kernels .*half.dtype=float16, or take"):
        export(halved, format="onnx", **options)


def test_the_report_says_what_is_saved_and_that_cpus_seldom_gain(trained_unet, spec):
    context = make_context(spec)
    HalfPrecision(dtype="bfloat16").apply(trained_unet, context)
    line = context.report.lines["half precision"]
    assert "bfloat16 in 5 weighted layers" in line
    before, after = map(int, re.search(r"(\d+) KiB -> (\d+) KiB", line).groups())
    assert 0.45 < after / before < 0.55
    assert "seldom faster there, and not at all on ONNX Runtime's CPU" in line


def test_numbers_too_large_for_float16_are_refused(spec):
    net = train(TinyUNet(), make_spec(), epochs=1)
    with torch.no_grad():
        net.head.weight.mul_(1e6)
    with pytest.raises(
        MedliteError, match=r"float16 gives logits that are not finite .*dtype=bfloat16"
    ):
        HalfPrecision().apply(net, make_context(spec))
    HalfPrecision(dtype="bfloat16").apply(net, make_context(spec))


def test_logits_that_were_never_finite_are_refused(spec):
    net = TinyUNet().eval()
    with torch.no_grad():
        net.head.bias.fill_(float("nan"))
    with pytest.raises(MedliteError, match="look at what the net itself gives"):
        HalfPrecision(dtype="bfloat16").apply(net, make_context(spec))


def test_another_type_is_refused():
    with pytest.raises(ConfigError, match="dtype: 'float8' is not one of float16, bfloat16"):
        HalfPrecision(dtype="float8")
