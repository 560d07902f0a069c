import copy

import pytest
import torch
from toy_world import TinyClassifier, make_batch, make_context, make_spec

from medlite.compression.fine_tuning import FineTuning
from medlite.errors import ConfigError


@pytest.fixture
def classes():
    return make_spec("classification", "multiclass", num_classes=3)


def test_it_is_further_training_and_nothing_else(classes):
    start = TinyClassifier().eval()
    tuned, state = FineTuning(epochs=2, learning_rate=1e-3).apply(start, make_context(classes))
    trained = make_context(classes).fit(
        copy.deepcopy(start), name="plain", epochs=2, learning_rate=1e-3
    )
    image = make_batch(classes, 4).image
    assert state == {}
    assert torch.equal(tuned(image), trained(image))
    assert not torch.equal(tuned(image), start(image))


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="epochs: 0 is not a whole number from 1 up"):
        FineTuning(epochs=0, learning_rate=1e-3)
