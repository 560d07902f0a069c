"""The registry of published claims: claims.yaml, read and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

from medlite.errors import ConfigError, did_you_mean

REGISTRY = Path(__file__).with_name("claims.yaml")
QUANTITIES = ("params", "macs", "latency", "metric")
FORMS = ("deployed", "training")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published number of one network, with what it takes to check it."""

    model: str
    """option of conf/model"""
    quantity: str
    """params | macs | latency | metric"""
    claimed: str
    """as published; its digits say how precise it is"""
    source: str
    input: tuple[int, ...]
    """(C, H, W[, D])"""
    num_classes: int
    reason: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """values of the model's configuration, by key"""
    form: str = "deployed"
    """deployed, or training: before branches are merged"""
    unit: str = ""
    metric: str = ""
    """of a metric, as result.json names it"""
    dataset: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    """of a metric: the values that a run's configuration must have, by dotted key"""
    unavailable: str = ""
    """why it cannot be checked by counting"""

    @property
    def value(self) -> float:
        """The claimed number."""
        return float(self.claimed)

    @property
    def half_unit(self) -> float:
        """Half a unit in the last place that was published: what rounding may change.

        >>> Claim(
        ...     model="", quantity="params", claimed="2.1e6", source="", input=(), num_classes=1
        ... ).half_unit
        50000.0
        """
        exponent = Decimal(self.claimed).as_tuple().exponent
        assert isinstance(exponent, int)
        return 10.0**exponent / 2


def read_claims(path: Path = REGISTRY) -> list[Claim]:
    """All claims of a registry file, in its order.

    Raises:
        ConfigError: with every problem of the file.
    """
    problems: list[str] = []
    claims = []
    try:
        registry = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: {error}"]) from error
    if not isinstance(registry, dict) or not all(isinstance(n, dict) for n in registry.values()):
        raise ConfigError([f"{path}: expected a mapping of models, each with 'claims'"])
    for model, node in registry.items():
        shared = {key: node[key] for key in ("input", "num_classes", "with") if key in node}
        for index, own in enumerate(node.get("claims", [])):
            place = f"{path.name}: {model}.claims.{index}"
            merged = {"model": model, **shared, **own}
            found = list(_problems(merged))
            problems += [f"{place}: {problem}" for problem in found]
            if not found:
                merged["overrides"] = merged.pop("with", {})
                merged["input"] = tuple(merged["input"])
                claims.append(Claim(**merged))
    if problems:
        raise ConfigError(problems)
    return claims


def _problems(node: Mapping[str, Any]) -> Iterator[str]:
    known = {f.name for f in fields(Claim)} - {"overrides"} | {"with"}
    for key in node:
        if key not in known:
            yield f"no such key {key!r}, {did_you_mean(key, known)}"
    for key in ("quantity", "claimed", "source", "input", "num_classes"):
        if key not in node:
            yield f"{key!r} is missing"
    for key, options in (("quantity", QUANTITIES), ("form", FORMS)):
        if key in node and node[key] not in options:
            yield f"{key} {node[key]!r}, {did_you_mean(str(node[key]), options)}"
    try:
        Decimal(node.get("claimed", "0"))
    except (InvalidOperation, TypeError, ValueError):
        yield f"claimed {node['claimed']!r} is not a number in quotes"
    if not isinstance(node.get("claimed", ""), str):
        yield f"claimed {node['claimed']!r} must stand in quotes: its digits count"
    if node.get("quantity") == "latency" and "unavailable" not in node:
        yield "a latency needs 'unavailable': the hardware that it was claimed for is not here"
    if node.get("quantity") == "metric" and not {"metric", "dataset"} <= set(node):
        yield "a metric needs 'metric' and 'dataset'"
