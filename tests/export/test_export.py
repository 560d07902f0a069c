"""Files that hold the network, all of it, and nothing of the machine that wrote them."""

import hashlib
import zipfile

import onnx
import pytest
import torch
from torch import nn

from medlite.errors import ExportError
from medlite.export.export import export, export_all
from medlite.export.trace import deployable
from medlite.types import Artifact

FORMATS = {
    "onnx": [".onnx"],
    "openvino": [".xml", ".bin"],
    "executorch": [".pte"],
    "torch": [".pt2"],
}
SHAPE = (3, 8, 8)


class Doubled(nn.Module):
    def forward(self, images):
        return torch.ops.medlite_test.double(images)


class Branching(nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


class Padded(nn.Module):
    def __init__(self, pad):
        super().__init__()
        self.pad = pad

    def forward(self, images):
        return nn.functional.pad(images, self.pad, mode="replicate") + 1


class OfTwoImages(nn.Module):
    def forward(self, images):
        return images.reshape(2, -1)


class TwoHeads(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)), images.amax((2, 3))


class Reparameterisable(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 2, 3) for _ in range(4))

    def forward(self, images):
        return sum(branch(images) for branch in self.branches)

    def deploy(self):
        fused = nn.Conv2d(3, 2, 3)
        with torch.no_grad():
            fused.weight.copy_(sum(branch.weight for branch in self.branches))
            fused.bias.copy_(sum(branch.bias for branch in self.branches))
        return fused


@torch.library.custom_op("medlite_test::double", mutates_args=())
def _double(images: torch.Tensor) -> torch.Tensor:
    return images * 2


@_double.register_fake
def _(images):
    return torch.empty_like(images)


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    )


def write(net, directory, format="onnx"):
    return export(net, format=format, input_shape=SHAPE, directory=directory, stem="net")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("artifacts")
    return {format: write(small_cnn(), directory, format) for format in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
def test_artifact_lists_every_file_with_its_size_and_digest(artifacts, format):
    artifact = artifacts[format]
    content = b"".join(file.read_bytes() for file in artifact.files)
    assert [file.suffix for file in artifact.files] == FORMATS[format]
    assert artifact.path == artifact.files[0]
    assert artifact.num_bytes == len(content)
    assert artifact.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("format", FORMATS)
def test_artifact_knows_its_shapes_and_survives_json(artifacts, format):
    artifact = artifacts[format]
    assert (artifact.input_shape, artifact.output_shape) == (SHAPE, (4,))
    assert artifact.precision == "fp32"
    assert Artifact.from_json(artifact.to_json()) == artifact


def test_nothing_but_the_artifacts_stands_in_the_directory(artifacts):
    endings = {ending for group in FORMATS.values() for ending in group}
    assert {f.suffix for f in artifacts["onnx"].path.parent.iterdir()} == endings


def test_onnx_names_its_tensors_and_keeps_the_batch_open(artifacts):
    graph = onnx.load(artifacts["onnx"].path).graph
    assert (graph.input[0].name, graph.output[0].name) == ("images", "logits")
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_openvino_keeps_float32_weights(artifacts):
    num_parameters = sum(p.numel() for p in small_cnn()[0].parameters()) + 512 * 4
    assert artifacts["openvino"].files[1].stat().st_size >= 4 * num_parameters


def test_no_file_names_the_source_code_it_came_from(artifacts):
    for artifact in (artifacts[format] for format in ("onnx", "openvino", "executorch")):
        assert b".py" not in b"".join(file.read_bytes() for file in artifact.files)
    with zipfile.ZipFile(artifacts["torch"].path) as archive:
        graph = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        assert b".py" not in archive.read(graph)


def test_a_failed_export_leaves_the_earlier_file_alone(tmp_path):
    before = write(small_cnn(), tmp_path).path.read_bytes()
    with pytest.raises(ExportError):
        write(nn.Sequential(nn.Conv2d(3, 8, 3), Doubled()), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_bytes() == before


def test_deployable_form_is_reparameterised_and_a_copy():
    net = Reparameterisable().train()
    images = torch.randn(2, *SHAPE)
    deployed = deployable(net)
    assert isinstance(deployed, nn.Conv2d)
    assert net.training
    torch.testing.assert_close(deployed(images), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pad", "count"), [((0, 0, 0, 0), 0), ((0, 1, 0, 0), 1)])
def test_padding_by_nothing_is_left_out(tmp_path, pad, count):
    artifact = export(
        Padded(pad), format="onnx", input_shape=SHAPE, directory=tmp_path, stem="padded"
    )
    operators = [node.op_type for node in onnx.load(artifact.path).graph.node]
    assert operators.count("Pad") == count


def test_export_leaves_the_network_in_its_mode(tmp_path):
    net = small_cnn().train()
    write(net, tmp_path)
    assert net.training
    assert all(module.training for module in net.modules())


def test_quantised_graph_is_int8_and_its_float_weights_are_gone(tmp_path, quantised_cnn):
    artifact = write(quantised_cnn, tmp_path, "torch")
    program = torch.export.load(artifact.path)
    assert artifact.precision == "int8"
    assert not [name for name, _ in program.named_parameters() if name.endswith("weight")]
    assert any(name.startswith("_frozen_param") for name, _ in program.named_buffers())


def test_torch_file_names_the_module_that_registers_its_operators(tmp_path):
    artifact = write(nn.Sequential(Doubled()), tmp_path, "torch")
    assert artifact.imports == (__name__,)


def test_operator_that_onnx_lacks_is_named_with_its_layer(tmp_path):
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(3, 8, 3))
    net.add_module("odd", Doubled())
    with pytest.raises(
        ExportError, match=r"no operator for 'medlite_test\.double\S*' in layer 'odd'"
    ):
        write(net, tmp_path)


def test_operator_of_unknown_origin_is_refused(tmp_path):
    library = torch.library.Library("medlite_anonymous", "DEF")
    library.define("same(Tensor x) -> Tensor")
    library.impl("same", lambda x: x.clone(), "CompositeExplicitAutograd")

    class Anonymous(nn.Module):
        def forward(self, images):
            return torch.ops.medlite_anonymous.same(images)

    with pytest.raises(ExportError, match="'medlite_anonymous::same' was not registered with"):
        write(nn.Sequential(Anonymous()), tmp_path, "torch")


def test_onnx_that_openvino_cannot_read_is_refused(tmp_path, monkeypatch):
    def refuse(core, path):
        message = "unknown operator Odd"
        raise RuntimeError(message)

    monkeypatch.setattr("openvino.Core.read_model", refuse)
    with pytest.raises(ExportError, match=r"OpenVINO cannot read .* unknown operator Odd"):
        write(small_cnn(), tmp_path, "openvino")


def test_data_dependent_layer_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"cannot trace .* in layer '1'.*branch on its data"):
        write(nn.Sequential(nn.ReLU(), Branching()), tmp_path)


def test_network_that_fixes_its_batch_is_refused(tmp_path):
    with pytest.raises(ExportError, match="fix the number of images in a batch"):
        write(nn.Sequential(OfTwoImages()), tmp_path)


def test_network_with_two_outputs_is_refused(tmp_path):
    with pytest.raises(ExportError, match="one tensor of logits, not 2 outputs"):
        write(nn.Sequential(TwoHeads()), tmp_path)


def test_unknown_format_gets_the_closest_one(tmp_path):
    with pytest.raises(ExportError, match="'onx'; did you mean 'onnx'"):
        write(small_cnn(), tmp_path, "onx")


def test_formats_exported_together_are_those_exported_alone(artifacts, tmp_path):
    together = export_all(
        small_cnn(), formats=FORMATS, input_shape=SHAPE, directory=tmp_path, stem="net"
    )
    weights = {
        name: each["openvino"].files[1] for name, each in [("a", artifacts), ("b", together)]
    }
    assert together["onnx"].sha256 == artifacts["onnx"].sha256
    assert weights["a"].read_bytes() == weights["b"].read_bytes()
    assert [file.name for file in together["torch"].files] == ["net.pt2"]
