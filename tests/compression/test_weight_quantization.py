"""Weights of 4, 3 or 2 bits, or of one scale a tensor; activations stay as they are."""

import io
import re
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn
from toy_world import TinyClassifier, TinyUNet, make_batch, make_context, make_spec, task_loss

from medlite.compression.quantization import PostTrainingQuantization, QuantizationAwareTraining
from medlite.compression.quantized_graph import count_quantized
from medlite.errors import ExportError, MedliteError
from medlite.export.export import export, export_all
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.runtimes.openvino import OpenVinoRuntime
from medlite.types import Hardware

HARDWARE = Hardware(num_threads=1)
RUNTIMES = (OnnxRuntime(), OpenVinoRuntime())
SLOW = pytest.mark.slow
PTQ = PostTrainingQuantization(calibration_samples=16)
QAT = QuantizationAwareTraining(epochs=2, learning_rate=1e-3, calibration_samples=16)


class Upsampler(nn.Module):
    """A transposed convolution between two others, and a depthwise one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Conv2d(6, 1, 1)

    def forward(self, image):
        return self.head(self.up(self.depthwise(self.stem(image)).relu()).relu())


def wide_classifier():
    torch.manual_seed(0)
    net = TinyClassifier()
    net.head = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 3))
    return net.eval()


def initializer_types(path):
    return {each.data_type for each in onnx.load(path).graph.initializer}


def relative_error(net, reference, image):
    logits, expected = net(image), reference(image)
    return ((logits - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("step", [PTQ, QAT], ids=["ptq", "qat"])
def test_restored_net_is_the_same_to_the_last_bit(trained_unet, spec, step, bits, per_channel):
    step = replace(step, weight_bits=bits, per_channel=per_channel)
    quantised, state = step.apply(trained_unet, make_context(spec))
    file = io.BytesIO()
    torch.save((state, quantised.state_dict()), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    torch.manual_seed(5)
    restored = step.restore(TinyUNet(), state, spec)
    restored.load_state_dict(weights, strict=True)
    image = make_batch(spec, 4, seed=3).image
    assert (restored(image) - quantised(image)).abs().max().item() == 0.0


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_trained_net_is_the_exported_net(trained_unet, spec, bits):
    context = make_context(spec)
    quantised, _ = replace(QAT, weight_bits=bits).apply(trained_unet, context)
    image = make_batch(spec, 8, seed=3).image
    assert torch.allclose(context.fit.nets[0](image), quantised(image), atol=1e-6)


def test_more_bits_err_less(trained_unet, spec):
    image = make_batch(spec, 8, seed=3).image
    errors = []
    for bits in (4, 3, 2):
        quantised, _ = replace(PTQ, weight_bits=bits).apply(trained_unet, make_context(spec))
        errors.append(relative_error(quantised, trained_unet, image))
    assert errors == sorted(errors)
    assert errors[0] < 0.1


def test_a_scale_a_channel_errs_less_than_one_a_tensor(trained_unet, spec):
    net = TinyUNet().eval()
    net.load_state_dict(trained_unet.state_dict())
    with torch.no_grad():
        net.refine[1].weight.mul_(torch.logspace(-2, 0, 16))
    image = make_batch(spec, 8, seed=3).image
    errors = [
        relative_error(
            replace(PTQ, weight_bits=4, per_channel=each).apply(net, make_context(spec))[0],
            net,
            image,
        )
        for each in (True, False)
    ]
    assert errors[0] < errors[1]


def test_training_mends_ternary_weights(trained_unet, spec):
    step = replace(QAT, weight_bits=2, epochs=4, learning_rate=1e-2)
    rounded, _ = replace(PTQ, weight_bits=2).apply(trained_unet, make_context(spec))
    trained, _ = step.apply(trained_unet, make_context(spec))
    batch = make_batch(spec, 16, seed=60)
    losses = [task_loss(spec, net(batch.image), batch) for net in (trained, rounded)]
    assert losses[0] < 0.7 * losses[1]


def test_transposed_and_depthwise_convolutions_are_rounded_by_output_channel(spec):
    torch.manual_seed(0)
    quantised, _ = replace(PTQ, weight_bits=2).apply(Upsampler().eval(), make_context(spec))
    assert count_quantized(quantised) == 2
    scales = [t.shape[0] for n, t in quantised.named_buffers() if n.startswith("_scale")]
    assert sorted(scales) == [6, 8]


def test_weights_alone_need_no_calibration_images(trained_unet, spec):
    def no_images(count):
        raise AssertionError

    context = replace(make_context(spec), calibration_images=no_images)
    _, state = replace(PTQ, weight_bits=4).apply(trained_unet, context)
    assert state == {"ranges": {}}


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (4, "weights in 4 bits in 3 of 5 weighted layers, with one scale a channel"),
        (3, "Stored in 4 bits each in ONNX and OpenVINO files, which know no 3"),
        (2, r"weights in 2 bits \(ternary: -1, 0, 1\)"),
        (4, "a runtime computes in float: smaller files, not faster"),
    ],
)
def test_the_report_says_what_a_runtime_makes_of_it(trained_unet, spec, bits, words):
    context = replace(make_context(spec), is_dry=True)
    replace(PTQ, weight_bits=bits).apply(trained_unet, context)
    assert re.search(words, context.report.lines["quantisation"])


def test_a_net_without_a_layer_to_round_is_refused(spec):
    with pytest.raises(MedliteError, match="of 1 weighted layers none is a convolution or linear"):
        replace(PTQ, weight_bits=4).apply(nn.Conv2d(1, 1, 1), make_context(spec))


@pytest.mark.parametrize(
    ("bits", "most_ratio", "kind"),
    [
        (4, 0.19, TensorProto.INT4),
        pytest.param(3, 0.19, TensorProto.INT4, marks=pytest.mark.slow),
        (2, 0.12, TensorProto.INT2),
    ],
)
def test_the_onnx_file_is_as_small_as_its_bits(tmp_path, bits, most_ratio, kind):
    torch.manual_seed(0)
    spec = make_spec(image_size=(8, 8))
    net = TinyUNet(width=64).eval()
    quantised, _ = replace(PTQ, weight_bits=bits).apply(net, make_context(spec))
    options = {"format": "onnx", "input_shape": spec.input_shape, "directory": tmp_path}
    whole = export(net, **options, stem="float")
    small = export(quantised, **options, stem="small")
    assert kind in initializer_types(small.path)
    assert small.num_bytes < most_ratio * whole.num_bytes
    assert small.precision == f"w{bits}"


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [pytest.param(b, marks=SLOW) for b in (8, 4, 3)] + [2])
def test_runtimes_agree_with_torch(tmp_path, classes, bits, per_channel):
    step = replace(PTQ, weight_bits=bits, per_channel=per_channel)
    quantised, _ = step.apply(wide_classifier(), make_context(classes))
    artifacts = export_all(
        quantised,
        formats=[runtime.format for runtime in RUNTIMES],
        input_shape=classes.input_shape,
        directory=tmp_path,
        stem="net",
    )
    images = make_batch(classes, 8, seed=80).image
    expected = quantised(images).detach()
    tolerance = 0.05 if bits == 8 else 1e-5
    for runtime in RUNTIMES:
        session = runtime.load(artifacts[runtime.format], HARDWARE)
        logits = torch.from_numpy(session(images.numpy()))
        assert (logits - expected).abs().max() < tolerance * expected.abs().max(), runtime.name


def test_one_scale_a_tensor_is_one_number_in_the_file(tmp_path, spec):
    torch.manual_seed(0)
    step = replace(PTQ, per_channel=False)
    quantised, _ = step.apply(TinyUNet().eval(), make_context(spec))
    artifact = export(
        quantised, format="onnx", input_shape=spec.input_shape, directory=tmp_path, stem="net"
    )
    graph = onnx.load(artifact.path).graph
    kept = {each.name: each for each in graph.initializer}
    unpackers = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    weights = [node for node in unpackers if node.input[0] in kept]
    of_images = [node for node in weights if len(kept[node.input[0]].dims) == 4]
    assert len(of_images) == 3
    assert all(not kept[node.input[1]].dims for node in of_images)
    counts = OnnxRuntime().count_operators(artifact, HARDWARE)
    assert counts["int8:QLinearConv"] == 3


def test_weights_are_unpacked_when_the_session_is_made_and_not_in_every_query(tmp_path, spec):
    quantised, _ = replace(PTQ, weight_bits=4).apply(TinyUNet().eval(), make_context(spec))
    artifact = export(
        quantised, format="onnx", input_shape=spec.input_shape, directory=tmp_path, stem="net"
    )
    assert "DequantizeLinear" not in OnnxRuntime().count_operators(artifact, HARDWARE)


@pytest.mark.slow
def test_executorch_refuses_weights_of_few_bits(tmp_path, spec):
    pytest.importorskip("executorch")
    quantised, _ = replace(PTQ, weight_bits=4).apply(TinyUNet().eval(), make_context(spec))
    options = {"input_shape": spec.input_shape, "directory": tmp_path, "stem": "net"}
    with pytest.raises(ExportError, match=r"cannot hold weights of 4 bits .* set weight_bits=8"):
        export(quantised, format="executorch", **options)


def test_eight_bits_and_one_scale_a_tensor_stay_close_to_float(trained_unet, spec):
    step = replace(PTQ, per_channel=False)
    quantised, _ = step.apply(trained_unet, make_context(make_spec()))
    image = make_batch(spec, 8, seed=3).image
    assert relative_error(quantised, trained_unet, image) < 0.05
