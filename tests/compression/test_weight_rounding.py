import pytest
import torch

from medlite.compression.weight_rounding import PerChannelFakeQuantize, scale_of_least_error

LARGEST_CODES = {4: 7, 3: 3, 2: 1}


def weight_part(bits, ch_axis=0, shares_scale=False):
    part = PerChannelFakeQuantize(
        dtype=torch.int8,
        quant_min=-LARGEST_CODES[bits],
        quant_max=LARGEST_CODES[bits],
        qscheme=torch.per_channel_symmetric,
        ch_axis=ch_axis,
        shares_scale=shares_scale,
    )
    part.mode = "apply"
    return part


def squared_errors(rows, scale, largest):
    scale = scale.double()[:, None]
    codes = (rows.double() / scale).round().clamp(-largest, largest)
    return (rows.double() - codes * scale).square().sum(1)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_scale_errs_no_more_than_the_best_of_a_fine_search(bits):
    torch.manual_seed(0)
    rows = torch.randn(4, 200) * torch.tensor([0.01, 0.1, 1.0, 10.0])[:, None]
    largest = LARGEST_CODES[bits]
    grid = torch.linspace(0.02, 1.1, 4000)[:, None] * rows.abs().amax(1) / largest
    best = torch.stack([squared_errors(rows, scale, largest) for scale in grid]).amin(0)
    found = squared_errors(rows, scale_of_least_error(rows, largest), largest)
    assert (found <= 1.01 * best).all()


def test_an_outlier_does_not_round_all_other_weights_to_zero():
    torch.manual_seed(0)
    weight = torch.randn(1, 500)
    weight[0, 0] = 12.0
    rounded = weight_part(2)(weight)
    assert (rounded != 0).float().mean() > 0.4


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_each_channel_has_no_more_values_than_its_bits_have_codes(bits):
    torch.manual_seed(0)
    rounded = weight_part(bits, ch_axis=1)(torch.randn(40, 3, 5))
    counts = [len(channel.unique()) for channel in rounded.unbind(1)]
    most = 2 * LARGEST_CODES[bits] + 1
    assert all(most // 2 < count <= most for count in counts)


def test_a_shared_scale_is_the_same_for_all_channels_and_that_of_all_weights():
    torch.manual_seed(0)
    weight = torch.randn(3, 100) * torch.tensor([0.1, 1.0, 3.0])[:, None]
    part = weight_part(3, shares_scale=True)
    part(weight)
    expected = scale_of_least_error(weight.flatten()[None], 3)
    assert part.scale.tolist() == expected.expand(3).tolist()


def test_a_weight_of_zeros_stays_zero():
    assert torch.equal(weight_part(2)(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_gradients_pass_even_where_a_weight_is_cut_off():
    weight = torch.tensor([[0.1, -0.1, 0.1, -0.1, 0.1, 5.0]] * 2, requires_grad=True)
    weight_part(4)(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
