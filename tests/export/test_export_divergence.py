"""The layer at which a file parts from torch is found by name."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from medlite.errors import ExportError
from medlite.export.divergence import first_divergence
from medlite.export.export import export

IMAGES = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, images):
        return self.head(self.body(self.stem(images)).relu().mean((2, 3)))


def write(net, directory, format):
    return export(net, format=format, input_shape=(3, 8, 8), directory=directory, stem="net")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_faithful_file_has_no_divergence(net, tmp_path, format):
    assert first_divergence(net, write(net, tmp_path, format), IMAGES) is None


def test_faithful_quantised_file_has_no_divergence(quantised_cnn, tmp_path):
    assert first_divergence(quantised_cnn, write(quantised_cnn, tmp_path, "onnx"), IMAGES) is None


def test_tampered_weight_is_found_in_its_layer(net, tmp_path):
    artifact = write(net, tmp_path, "onnx")
    model = onnx.load(artifact.path)
    weight = next(each for each in model.graph.initializer if each.name == "body.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(model, artifact.path)
    found = first_divergence(net, artifact, IMAGES)
    assert found.layer == "body"
    assert found.num_compared > 3
    assert "layer 'body' (aten.conv2d" in str(found)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_changed_network_is_found_at_its_last_layer(net, tmp_path, format):
    artifact = write(net, tmp_path, format)
    with torch.no_grad():
        net.head.weight += 1
    assert first_divergence(net, artifact, IMAGES).layer == "head"


@pytest.mark.parametrize("format", ["torch", "executorch"])
def test_format_without_inner_tensors_is_refused(net, tmp_path, format):
    artifact = replace(write(net, tmp_path, "torch"), format=format)
    with pytest.raises(ExportError, match=f"'{format}' does not show its inner tensors"):
        first_divergence(net, artifact, IMAGES)
