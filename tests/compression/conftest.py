import pytest
import torch
from toy_world import TinyUNet, make_spec, train


@pytest.fixture
def spec():
    return make_spec()


@pytest.fixture
def classes():
    return make_spec("classification", "multiclass", num_classes=3)


@pytest.fixture(scope="session")
def trained_unet():
    torch.manual_seed(0)
    return train(TinyUNet(), make_spec())
