"""The options of state-space layers."""

import pytest

from medlite.errors import ConfigError
from medlite.models.layers.ssm import Ssm


@pytest.mark.parametrize(("channels", "num_heads"), [(64, 4), (24, 2), (12, 1), (20, 2), (17, 17)])
def test_heads_divide_the_channels_and_are_as_large_as_allowed(channels, num_heads):
    assert Ssm(kind="ssd", head_dim=16).num_heads(channels) == num_heads


def test_all_wrong_options_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        Ssm(kind="sdd", d_state=0)
    assert "model.ssm.kind: 'sdd' is none, did you mean 'ssd'?" in str(caught.value)
    assert "model.ssm.d_state: 0 is not a whole number from 1 up" in str(caught.value)
