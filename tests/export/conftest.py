import pytest
import torch
from torch import nn

from medlite.compression.quantized_graph import calibrate, convert, prepare
from medlite.compression.quantizer import Int8Quantizer


@pytest.fixture(scope="session")
def quantised_cnn():
    """A graph as quantisation leaves it: quantise and dequantise nodes, weights in 8 bits."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 4),
    ).eval()
    quantizer = Int8Quantizer(keep_first_float=False, keep_last_float=False, keep_float=())
    prepared = prepare(net, (3, 8, 8), quantizer)
    calibrate(prepared, torch.randn(16, 3, 8, 8), batch_size=16, method="minmax")
    return convert(prepared, (3, 8, 8))
