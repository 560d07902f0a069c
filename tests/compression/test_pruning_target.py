import pytest
from torch import nn

from medlite.compression.pruning_target import search, size_of
from medlite.export.layer_costs import count_parameters
from medlite.models.timm_classifier import TimmClassifier


class Stairs:
    """A measure that falls in steps with the share of channels, and counts its uses."""

    def __init__(self, num_steps, power=2):
        self.num_steps, self.power = num_steps, power
        self.num_measured = 0

    def height(self, step):
        return (step / self.num_steps) ** self.power

    def __call__(self, share):
        step = max(1, int(share * self.num_steps))
        return step, lambda: self._measure(step)

    def _measure(self, step):
        self.num_measured += 1
        return self.height(step)


@pytest.mark.parametrize("num_steps", [3, 10, 64])
@pytest.mark.parametrize("wanted", [0.15, 0.5, 0.85])
def test_the_largest_within_the_target_is_found(num_steps, wanted):
    stairs = Stairs(num_steps)
    within = [h for step in range(1, num_steps + 1) if (h := stairs.height(step)) <= wanted]
    found = search(stairs, wanted, least=0.0)
    assert found.reached == max(within)
    assert stairs(found.share_left)[1]() == found.reached


def test_nets_that_look_alike_are_measured_once():
    stairs = Stairs(10)
    found = search(stairs, 0.5, least=0.0)
    assert found.num_tries == stairs.num_measured <= 10


def test_a_search_ends_after_so_many_nets_with_one_within_the_target():
    stairs = Stairs(10_000)
    found = search(stairs, 0.5, least=0.0, most_tries=5)
    assert stairs.num_measured == 5
    assert 0 < found.reached <= 0.5


def test_where_the_least_is_too_much_the_least_is_taken():
    found = search(Stairs(10), 0.005, least=0.1)
    assert (found.share_left, found.reached, found.num_tries) == (0.1, pytest.approx(0.01), 1)


def test_multiply_adds_are_those_of_the_closed_form():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    size = size_of(net, (3, 4, 4))
    assert (size.macs, size.params) == (8 * 3 * 9 * 16 + 8 * 16 * 5, 8 * 28 + 5 * 129)


def test_branches_count_as_the_one_convolution_that_is_deployed():
    net = TimmClassifier(in_channels=3, num_classes=2, name="mobileone_s0").eval()
    size = size_of(net, (3, 32, 32))
    own = sum(parameter.numel() for parameter in net.deploy().parameters())
    assert size.params == count_parameters(net) == own
    assert size.params < sum(p.numel() for p in net.parameters()) / 2
