"""The scan of Mamba-2 in ONNX Runtime and OpenVINO, against a float64 loop."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from medlite.export.export import export_all
from medlite.models.layers.mamba import MambaBlock
from medlite.models.layers.scans.reference import ssd_scan_reference
from medlite.runtimes.openvino_core import openvino_core

STATES = 16


class Scan(nn.Module):
    """A scan over images (2 C + 2 N + H, P, L): x, then what it is scanned with."""

    def __init__(self, channels, heads, sets):
        super().__init__()
        self.sizes = [channels, heads, STATES, STATES]
        self.A = nn.Parameter(-1 - 15 * torch.rand(sets, heads))
        self.D = nn.Parameter(torch.linspace(-1, 1, sets * channels).view(sets, channels))

    def operands(self, images):
        x, delta, B, C = images.permute(0, 2, 3, 1).split(self.sizes, dim=-1)
        return x, delta, self.A, B, C, self.D

    def forward(self, images):
        return torch.ops.medlite.ssd_scan(*self.operands(images))


def make_images(net, batch, length):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, sum(net.sizes), len(net.A), length, generator=generator)
    channels, heads = net.sizes[:2]
    steps = images[:, channels : channels + heads]
    steps.copy_(1e-3 * 100 ** torch.rand(steps.shape, generator=generator))
    return images


def run_onnxruntime(artifact, images):
    session = onnxruntime.InferenceSession(artifact.path)
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def run_openvino(artifact, images):
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino_core().compile_model(artifact.path, "CPU", config)(images.numpy())[0]


RUNTIMES = {"onnx": run_onnxruntime, "openvino": run_openvino}


def relative_error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


SIZES = [(12, 1, 1, 64), (128, 2, 4, 49), (12, 12, 2, 33), (64, 2, 1, 1500)]


@pytest.mark.parametrize(
    ("format", "sizes"),
    [*(("onnx", sizes) for sizes in SIZES), ("openvino", SIZES[1]), ("openvino", SIZES[3])],
)
def test_both_runtimes_equal_the_loop_for_any_batch_and_step(tmp_path, format, sizes):
    channels, heads, sets, length = sizes
    torch.manual_seed(0)
    net = Scan(channels, heads, sets).eval()
    shape = (sum(net.sizes), sets, length)
    artifacts = export_all(
        net, formats=[format], input_shape=shape, directory=tmp_path, stem="scan"
    )
    for batch in (1, 3):
        images = make_images(net, batch, length)
        for scale in (1.0, 1e-3, 500.0, 0.0):
            scaled = images.clone()
            scaled[:, channels : channels + heads] *= scale
            expected = ssd_scan_reference(*net.operands(scaled)).detach().numpy()
            actual = RUNTIMES[format](artifacts[format], scaled)
            assert relative_error(actual, expected) < 1e-6, scale


class Net(nn.Module):
    """A block in which the scan weighs as much as the rest; in a fresh one it hardly does."""

    def __init__(self):
        super().__init__()
        self.block = MambaBlock(16, num_heads=2)
        with torch.no_grad():
            self.block.x_proj.weight.mul_(10)
            self.block.dt_proj.bias.add_(3)

    def forward(self, images):
        return self.block(images.flatten(2).mT).mT


def test_onnxruntime_gets_its_own_operator_and_openvino_products(tmp_path):
    import onnx

    torch.manual_seed(0)
    net, images = Net().eval(), torch.randn(2, 16, 8, 8)
    artifacts = export_all(
        net, formats=RUNTIMES, input_shape=(16, 8, 8), directory=tmp_path, stem="net"
    )
    operators = [node.op_type for node in onnx.load(artifacts["onnx"].path).graph.node]
    assert operators.count("LinearAttention") == 1
    layers = {
        op.get_type_name()
        for op in openvino_core().read_model(artifacts["openvino"].path).get_ops()
    }
    assert not layers & {"Loop", "TensorIterator"}
    expected = net(images).detach().numpy()
    for format, run in RUNTIMES.items():
        assert relative_error(run(artifacts[format], images), expected) < 1e-5


def test_block_without_its_scan_gives_something_else(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net, images = Net().eval(), torch.randn(1, 16, 8, 8)
    artifact = export_all(
        net, formats=["onnx"], input_shape=(16, 8, 8), directory=tmp_path, stem="net"
    )["onnx"]
    monkeypatch.setattr("medlite.models.layers.mamba.ssd_scan", lambda x, *_: x)
    assert relative_error(run_onnxruntime(artifact, images), net(images).detach().numpy()) > 1e-2
