import pytest
import torch

from medlite.compression.fake_quantize import (
    PerChannelFakeQuantize,
    PerTensorFakeQuantize,
)


def activation_part():
    return PerTensorFakeQuantize(
        dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine
    )


def weight_part():
    return PerChannelFakeQuantize(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def measured(values):
    part = activation_part()
    part(values)
    part.mode = "apply"
    return part


def test_rounding_is_the_formula_of_the_paper():
    values = torch.linspace(-1.0, 3.0, 1001)
    scale, zero_point = 4.0 / 255, round(1.0 / (4.0 / 255))
    codes = (torch.round(values / scale) + zero_point).clamp(0, 255)
    expected = (codes - zero_point) * scale
    assert torch.allclose(measured(values)(values), expected, atol=1e-6)


def test_zero_has_an_exact_code_even_outside_of_what_was_seen():
    part = measured(torch.linspace(2.0, 3.0, 50))
    assert part(torch.zeros(1)).item() == 0.0
    assert part.low.item() == 0.0


def test_measuring_changes_no_value():
    values = torch.randn(100)
    assert torch.equal(activation_part()(values), values)


def test_gradients_pass_straight_through_inside_the_range_only():
    part = measured(torch.tensor([-1.0, 1.0]))
    values = torch.tensor([0.3, 5.0], requires_grad=True)
    part(values).sum().backward()
    assert values.grad.tolist() == [1.0, 0.0]


def test_training_moves_the_range_and_applying_does_not():
    part = measured(torch.tensor([-1.0, 1.0]))
    part(torch.tensor([-9.0, 9.0]))
    assert (part.low.item(), part.high.item()) == (-1.0, 1.0)
    part.mode = "train"
    part(torch.tensor([-9.0, 9.0]))
    assert part.high.item() == pytest.approx(1.0 + 0.05 * 8.0)
    assert part.low.item() == pytest.approx(-1.0 - 0.05 * 8.0)


def test_search_finds_the_fraction_that_brute_force_finds():
    torch.manual_seed(0)
    values = torch.randn(200_000)
    part = measured(torch.tensor([-12.0, 12.0]))
    part.mode = "search"
    for _ in range(4):
        part(values)
    low, high = part.low.item(), part.high.item()
    part.set_range_of_least_error()

    def error(fraction):
        scale = fraction * (high - low) / 255
        zero_point = round(-fraction * low / scale)
        codes = (torch.round(values / scale) + zero_point).clamp(0, 255)
        return ((codes - zero_point) * scale - values).square().sum().item()

    best = min(torch.linspace(1.0, 0.3, 36).tolist(), key=error)
    assert best < 0.6
    assert part.high.item() == pytest.approx(best * high, rel=0.1)


def test_weights_are_symmetric_and_scaled_channel_by_channel():
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 10.0, 0.1, 3.0])[:, None, None, None]
    part = weight_part()
    part.mode = "apply"
    rounded = part(weight)
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    assert torch.allclose(rounded, torch.round(weight / scale) * scale, atol=1e-6)
    assert part.calculate_qparams()[1].tolist() == [0, 0, 0, 0]


def test_a_channel_of_zeros_stays_zero():
    part = weight_part()
    part.mode = "apply"
    assert torch.equal(part(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_percentiles_cut_off_outliers_and_keep_zero():
    values = torch.cat([torch.linspace(1.0, 2.0, 9990), torch.full((10,), 500.0)])
    part = activation_part()
    for mode in ("measure", "count"):
        part.mode = mode
        part(values)
    part.set_range_of_percentile(99.0)
    assert part.low.item() == 0.0
    assert part.high.item() == pytest.approx(1.99, rel=0.01)
