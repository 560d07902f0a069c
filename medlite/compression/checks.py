"""Wrong option values, found when a step is made and named as the configuration names them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from medlite.errors import ConfigError


def check_options(rules: Iterable[tuple[str, Any, bool, str]]) -> None:
    """Raise one error for all values that are out of their range.

    Args:
        rules: (option, value, whether it is right, what it should be).

    Raises:
        ConfigError: some value is wrong.

    >>> check_options([("ratio", 0.5, 0 < 0.5 < 1, "in (0, 1)")])
    """
    problems = [
        f"{key}: {value!r} is not {what}" for key, value, is_right, what in rules if not is_right
    ]
    if problems:
        raise ConfigError(problems)


def training_rules(epochs: int, learning_rate: float) -> list[tuple[str, Any, bool, str]]:
    """The rules for the two options that every training step has."""
    return [
        ("epochs", epochs, epochs >= 1, "a whole number from 1 up"),
        ("learning_rate", learning_rate, learning_rate > 0, "above 0"),
    ]
