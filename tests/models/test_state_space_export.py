"""Every state-space network, small, on both engines and with both recurrences."""

import numpy as np
import pytest
import torch

from medlite.export.export import export_all
from medlite.models.layers.ssm import Ssm
from medlite.models.light_vm2d_unet import LightVM2DUNet
from medlite.models.lightm_unet import LightMUNet
from medlite.models.medmamba import MedMamba
from medlite.models.slice_mamba_unet import SliceMambaUNet
from medlite.models.ultralight_vm_unet import UltraLightVMUNet
from medlite.models.vm_unet import VMUNet
from medlite.models.vmamba import VMamba
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.runtimes.openvino import OpenVinoRuntime
from medlite.types import Hardware

ENGINES = [OnnxRuntime(), OpenVinoRuntime()]
KINDS = {"s6": Ssm(d_state=4), "ssd": Ssm(kind="ssd", d_state=4, head_dim=4)}
NETS = {
    "ultralight_vm_unet": (UltraLightVMUNet, {"widths": (4, 4, 4, 8, 8, 8)}, (64, 32)),
    "lightm_unet": (LightMUNet, {"init_filters": 8, "blocks_down": (1, 1)}, (12, 16)),
    "lightm_unet 3-D": (
        LightMUNet,
        {"init_filters": 8, "blocks_down": (1, 1), "spatial_dims": 3},
        (8, 8, 12),
    ),
    "vm_unet": (VMUNet, {"width": 8, "depths": (1, 1), "depths_decoder": (1, 1)}, (24, 32)),
    "medmamba_t": (MedMamba, {"width": 8, "depths": (1, 1)}, (20, 24)),
    "medmamba_lite": (
        MedMamba,
        {"width": 8, "depths": (1, 1), "separable_conv": True, "shared_scan": True},
        (20, 24),
    ),
    "vmamba_t": (VMamba, {"width": 8, "depths": (1, 1)}, (20, 28)),
    "slice_mamba_unet": (SliceMambaUNet, {"widths": (8, 8), "depths": (0, 1)}, (8, 12, 5)),
}


def make_images(batch, size):
    return torch.randn(batch, 2, *size, generator=torch.Generator().manual_seed(0))


def difference_of_engines(net, size, directory):
    """The largest, over the largest logit, at a batch size that tracing did not see."""
    images = make_images(3, size)
    with torch.no_grad():
        expected = net(images).numpy()
    artifacts = export_all(
        net,
        formats=[engine.format for engine in ENGINES],
        input_shape=(2, *size),
        directory=directory,
        stem="net",
    )
    logits = [
        engine.load(artifacts[engine.format], Hardware(num_threads=1))(images.numpy())
        for engine in ENGINES
    ]
    return max(np.abs(given - expected).max() for given in logits) / np.abs(expected).max()


def make_net(build, **arguments):
    torch.manual_seed(0)
    return build(in_channels=2, num_classes=3, **arguments).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETS)
def test_both_engines_agree_with_torch(tmp_path, name, kind):
    build, arguments, size = NETS[name]
    net = make_net(build, ssm=KINDS[kind], **arguments)
    assert difference_of_engines(net, size, tmp_path) < 1e-5


def test_both_engines_agree_with_torch_on_a_wavefront_scan(tmp_path):
    net = make_net(LightVM2DUNet, widths=(8, 8), depths=(0, 2), d_state=4)
    assert difference_of_engines(net, (12, 20), tmp_path) < 1e-5
