"""ExecuTorch computes what torch does: scans under stress, softmax between convolutions, models."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from medlite.compression.quantized_graph import calibrate, convert, prepare
from medlite.compression.quantizer import Int8Quantizer
from medlite.errors import ExportError
from medlite.export.executorch_file import lower
from medlite.export.export import export
from medlite.models.layers.scans import reference
from medlite.models.layers.scans.selective import selective_scan
from medlite.models.layers.scans.ssd import ssd_scan
from medlite.models.layers.scans.wavefront import wavefront_scan
from medlite.models.lightm_unet import LightMUNet
from medlite.models.medmamba import MedMamba
from medlite.models.ultralight_vm_unet import UltraLightVMUNet
from medlite.runtimes.executorch import ExecuTorchRuntime
from medlite.types import Hardware

ONE_THREAD = Hardware(num_threads=1)
SELECTIVE = {
    "x": (1, 2, 77, 3), "delta": (1, 2, 77, 3), "A": (2, 3, 4), "B": (1, 2, 77, 4),
    "C": (1, 2, 77, 4), "D": (2, 3),
}  # fmt: skip
SSD = SELECTIVE | {"x": (1, 2, 77, 6), "delta": (1, 2, 77, 2), "A": (2, 2), "D": (2, 6)}
WAVEFRONT = {
    "x": (1, 4, 5, 3), "delta": (1, 2, 4, 5, 3), "A": (2, 3, 4), "B": (1, 2, 4, 5, 4),
    "C": (1, 4, 5, 4), "D": (3,),
}  # fmt: skip
SCANS = {
    "selective": (selective_scan, reference.selective_scan_reference, SELECTIVE),
    "ssd": (ssd_scan, reference.ssd_scan_reference, SSD),
    "wavefront": (wavefront_scan, reference.wavefront_scan_reference, WAVEFRONT),
}
STRESS = {
    "as initialised": lambda delta: delta,
    "long memory": lambda delta: delta * 1e-3,
    "no memory": lambda delta: delta * 500,
    "spikes": lambda delta: torch.where(torch.arange(delta.numel()) % 31 == 0, 20.0, 0.0).view_as(
        delta
    ),
}
"""step sizes: Mamba's, 1e-6 to 1e-4, up to 50, and zero with spikes of 20"""


class Scan(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *operands):
        return self.function(*operands)


def operands(shapes, stress="as initialised"):
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given["A"] = -16 * torch.rand(shapes["A"], generator=generator)
    drawn = torch.rand(shapes["delta"], generator=generator) * math.log(100)
    given["delta"] = STRESS[stress](1e-3 * drawn.exp())
    return tuple(given.values())


def relative_difference(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module", params=SCANS)
def lowered_scan(request, tmp_path_factory):
    function, expected, shapes = SCANS[request.param]
    path = tmp_path_factory.mktemp("scans") / f"{request.param}.pte"
    path.write_bytes(lower(torch.export.export(Scan(function), operands(shapes))))
    return path, expected, shapes


@pytest.mark.parametrize("stress", STRESS)
def test_scan_is_exact_under_stress(lowered_scan, stress):
    bindings = pytest.importorskip("executorch.extension.pybindings.portable_lib")
    path, expected, shapes = lowered_scan
    given = operands(shapes, stress)
    found = bindings._load_for_executorch(str(path)).forward(given)[0]
    assert relative_difference(found.numpy(), expected(*given).numpy()) <= 1e-6


class AttentionOfMaps(nn.Module):
    """As in EfficientFormerV2: attention maps pass through convolutions, softmax in between."""

    def __init__(self, dim):
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.dim = dim

    def forward(self, maps):
        return self.after(self.before(maps).softmax(self.dim))


def write(net, directory, side=8):
    options = {"input_shape": (3, side, side), "directory": directory, "stem": "net"}
    return export(net, format="executorch", **options)


def difference_from_torch(net, directory, side=8):
    session = ExecuTorchRuntime().load(write(net, directory, side), ONE_THREAD)
    images = np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32)
    with torch.no_grad():
        return relative_difference(session(images), net(torch.from_numpy(images)).numpy())


@pytest.mark.parametrize("dim", [-1, 1])
def test_softmax_between_convolutions_is_over_its_own_axis(dim, tmp_path):
    torch.manual_seed(0)
    assert difference_from_torch(AttentionOfMaps(dim).eval(), tmp_path) < 1e-6


def test_softmax_of_maps_never_goes_to_xnnpack(tmp_path):
    class Fused(AttentionOfMaps):
        def forward(self, maps):
            return self.after(torch._softmax(self.before(maps), -1, False))

    torch.manual_seed(0)
    assert difference_from_torch(Fused(-1).eval(), tmp_path) < 1e-6


def test_sides_are_fixed_and_batches_are_not(tmp_path):
    artifact = write(nn.Conv2d(3, 2, 3).eval(), tmp_path)
    session = ExecuTorchRuntime().load(artifact, ONE_THREAD)
    assert session(np.zeros((5, 3, 8, 8), np.float32)).shape == (5, 2, 6, 6)


def test_operator_without_decomposition_is_named_with_its_layer(tmp_path):
    net = nn.Sequential(nn.ReLU(), Sealed())
    with pytest.raises(ExportError, match=r"'medlite_test::unknown' in layer '1' have no decompo"):
        write(net, tmp_path)


class Spectrum(nn.Module):
    def forward(self, images):
        return torch.fft.fft2(images).real


def test_operator_that_executorch_does_not_know_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"ExecuTorch cannot hold this network: .*_fft"):
        write(Spectrum(), tmp_path)


def test_operator_without_kernel_is_refused(tmp_path):
    net = nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 2, (1, 3, 3)))
    with pytest.raises(ExportError, match=r"has no kernel for some operator.*3-D convolutions"):
        write(net, tmp_path)


@torch.library.custom_op("medlite_test::unknown", mutates_args=())
def _unknown(images: torch.Tensor) -> torch.Tensor:
    return images.clone()


_unknown.register_fake(torch.empty_like)


class Sealed(nn.Module):
    def forward(self, images):
        return torch.ops.medlite_test.unknown(images)


class Joined(nn.Module):
    """Two maps of very different ranges, which keep scales of their own until they are joined."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(24, 2, 1)
        self.large, self.small = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.joint = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, images):
        seen = self.first(images).relu()
        large, small = 20 * self.large(seen).relu(), self.small(seen).relu()
        joint = self.joint(torch.cat([large, small], 1)).relu()
        return self.last(torch.cat([joint, small], 1))


def test_maps_of_different_scales_are_joined_in_integers(tmp_path):
    torch.manual_seed(0)
    quantizer = Int8Quantizer(keep_first_float=False, keep_last_float=False, keep_float=())
    prepared = prepare(Joined().eval(), (3, 16, 16), quantizer)
    calibrate(prepared, torch.randn(16, 3, 16, 16), batch_size=16, method="minmax")
    quantised = convert(prepared, (3, 16, 16))
    images = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)
    found = ExecuTorchRuntime().load(write(quantised, tmp_path, 16), ONE_THREAD)(images)
    expected = quantised(torch.from_numpy(images)).detach().numpy()
    step = np.ptp(expected) / 255
    assert np.abs(found - expected).max() <= 2 * step
    assert (np.abs(found - expected) < step / 2).mean() > 0.9


@pytest.mark.slow
def test_efficientformer_with_layer_scales_as_trained_agrees_with_torch(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("efficientformerv2_s0", num_classes=2).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.2, 1.0)  # at 1e-5, as initialised, attention hardly counts
    assert difference_from_torch(net, tmp_path, side=224) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "options", "side"),
    [
        (UltraLightVMUNet, {"widths": (8, 8, 8, 16, 16, 16)}, 32),
        (LightMUNet, {"init_filters": 8, "blocks_down": (1, 1)}, 16),
        (MedMamba, {"width": 16, "depths": (1, 1)}, 32),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_state_space_model_agrees_with_torch(build, options, side, tmp_path):
    torch.manual_seed(0)
    net = build(in_channels=3, num_classes=2, **options).eval()
    assert difference_from_torch(net, tmp_path, side) <= 1e-5


@pytest.mark.slow
def test_quantised_state_space_model_runs_on_integers_around_a_float_scan(tmp_path):
    torch.manual_seed(0)
    net = UltraLightVMUNet(in_channels=3, num_classes=1, widths=(8, 8, 8, 16, 16, 16)).eval()
    quantizer = Int8Quantizer(keep_first_float=True, keep_last_float=True, keep_float=())
    prepared = prepare(net, (3, 32, 32), quantizer)
    calibrate(prepared, torch.randn(16, 3, 32, 32), batch_size=16, method="minmax")
    quantised = convert(prepared, (3, 32, 32))
    artifact = write(quantised, tmp_path, 32)
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    found = ExecuTorchRuntime().load(artifact, ONE_THREAD)(images)
    expected = quantised(torch.from_numpy(images)).detach().numpy()
    assert ((found > 0) == (expected > 0)).mean() > 0.98
    counts = ExecuTorchRuntime().count_operators(artifact, ONE_THREAD)
    assert counts["int8:Conv2d"] + counts["int8:FullyConnected"] > 20
