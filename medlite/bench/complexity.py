"""The costs of a network as measurements, and as a table of its layers."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from medlite.export.layer_costs import LayerCost, total
from medlite.types import Measurement


def measure_complexity(
    costs: Sequence[LayerCost], input_shape: tuple[int, ...]
) -> list[Measurement]:
    """The totals of `count_layers` for one image, as `complexity/...`."""
    whole = total(costs)
    shape = "x".join(str(side) for side in input_shape)
    note = f"deployed form, one image of {shape}"
    products = "convolutions, matrix products, attention"
    return [
        _measured("params", whole.params, "parameters", "deployed form"),
        _measured("gmacs", whole.macs / 1e9, "GMACs", f"{note}; {products}"),
        _measured("gflops", whole.flops / 1e9, "GFLOPs", f"{note}; {products}, scans"),
        _measured("activations_m", whole.activations / 1e6, "million", note),
        _measured(
            "memory_access_mib",
            whole.memory_access_bytes / 2**20,
            "MiB",
            f"{note}; every operator reads and writes memory",
        ),
    ]


def write_layers(costs: Mapping[str, Sequence[LayerCost]], path: Path) -> None:
    """Write the layers of each candidate as a csv file."""
    columns = ["candidate", *(field.name for field in fields(LayerCost))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for candidate, layers in costs.items():
            writer.writerows({"candidate": candidate, **asdict(layer)} for layer in layers)


def _measured(name: str, value: float, unit: str, note: str) -> Measurement:
    return Measurement(
        name=f"complexity/{name}", value=value, unit=unit, n=1, higher_is_better=False, note=note
    )
