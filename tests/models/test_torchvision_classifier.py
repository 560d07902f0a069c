"""The torchvision adapter: counts, channels, weights, and what is said about mistakes."""

from urllib.error import URLError

import pytest
import torch
import torchvision

from medlite.errors import ConfigError, MedliteError
from medlite.models.torchvision_classifier import TorchvisionClassifier

NAME = "shufflenet_v2_x0_5"


def classifier(**arguments):
    return TorchvisionClassifier(**{"in_channels": 3, "num_classes": 4, "name": NAME} | arguments)


@pytest.mark.parametrize(("name", "count"), [(NAME, 1_366_792), ("shufflenet_v2_x1_0", 2_278_604)])
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        net = classifier(name=name, num_classes=1000)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


def test_pretrained_weights_are_taken_where_they_fit(monkeypatch):
    published = torchvision.models.get_model(NAME).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published
    )
    net = classifier(pretrained=True)
    assert torch.equal(net.net.conv1[0].weight, published["conv1.0.weight"])
    assert net.net.fc.weight.shape == (4, 1024)


def test_grey_images_give_what_three_equal_colours_give(monkeypatch):
    published = torchvision.models.get_model(NAME).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published
    )
    colour, grey = classifier(pretrained=True), classifier(pretrained=True, in_channels=1)
    grey.net.fc.load_state_dict(colour.net.fc.state_dict())
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        actual, expected = grey.eval()(image), colour.eval()(image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_weights_that_cannot_be_downloaded_are_an_error(monkeypatch):
    def fail(*_, **__):
        message = "no network"
        raise URLError(message)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(MedliteError, match=r"could not be downloaded; set model\.pretrained=false"):
        classifier(pretrained=True)


def test_misspelt_names_and_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"torchvision has no 'shufflenet_v2', did you mean"):
        classifier(name="shufflenet_v2")
    with pytest.raises(ConfigError, match=r"model: .*unexpected keyword argument 'widht'"):
        classifier(widht=3)
