import numpy as np
import pytest
import torch

from medlite.compression.value_counts import ValueCounts

STEP = 2**-8  # half a step of bfloat16, relative


def counted(*batches):
    counts = ValueCounts()
    for batch in batches:
        counts.add(batch)
    return counts


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.5, 0.99, 0.9999])
def test_quantiles_over_batches_are_those_of_all_values(share):
    torch.manual_seed(0)
    batches = [torch.randn(50, 400) * 3 - 1 for _ in range(5)]
    expected = np.quantile(torch.cat(batches).numpy(), share, method="inverted_cdf")
    assert counted(*batches).quantile(share).item() == pytest.approx(expected, rel=STEP)


def test_an_outlier_costs_no_resolution():
    values = torch.cat([torch.linspace(0, 1, 100_000), torch.tensor([1e6])])
    assert counted(values).quantile(0.5).item() == pytest.approx(0.5, rel=STEP)
