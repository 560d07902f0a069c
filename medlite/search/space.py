"""All recipes that steps can be put together to, and their settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Any

from medlite.compression.order import check_order
from medlite.errors import ConfigError

Recipe = tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """What may be chosen.

    recipes: valid orders of steps, the shortest first.
    settings: key of the configuration, such as "compression.prune.ratio" -> its values. A key
    of a step counts only in recipes that have the step.
    """

    recipes: tuple[Recipe, ...]
    settings: Mapping[str, tuple[str, ...]]

    @property
    def size(self) -> int:
        """How many different jobs there are."""
        return sum(
            prod(len(self.settings[key]) for key in self.keys_of(recipe)) for recipe in self.recipes
        )

    def keys_of(self, recipe: Recipe) -> list[str]:
        """The settings that a recipe has."""
        return [key for key in self.settings if _step_of(key) in (None, *recipe)]


def build_space(steps: Mapping[str, Any], *, max_steps: int, settings: Iterable[str] = ()) -> Space:
    """Every valid order of one to `max_steps` of the steps, and the settings.

    Args:
        steps: name -> the step's class, which says where it may stand (see `check_order`).
        max_steps: the longest recipe.
        settings: words like "compression.prune.ratio=.3,.5".

    Raises:
        ConfigError: no order is valid, a word is no choice, or it is of a step that is not there.
    """
    orders = [
        order
        for length in range(1, max_steps + 1)
        for order in permutations(steps, length)
        if not check_order({name: steps[name] for name in order})
    ]
    choices, problems = _read(settings, list(steps))
    if not orders:
        problems.append(f"--steps {' '.join(steps)}: no order of them is valid")
    if problems:
        raise ConfigError(problems)
    return Space(tuple(orders), choices)


def overrides_of(recipe: Recipe, values: Mapping[str, str]) -> list[str]:
    """A choice as words of the command line.

    >>> overrides_of(("prune", "qat"), {"compression.prune.ratio": ".3"})
    ['compression=[prune,qat]', 'compression.prune.ratio=.3']
    """
    return [
        f"compression=[{','.join(recipe)}]",
        *(f"{key}={value}" for key, value in values.items()),
    ]


def _read(
    words: Iterable[str], steps: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    choices: dict[str, tuple[str, ...]] = {}
    problems = []
    for word in words:
        key, _, text = word.partition("=")
        values = tuple(value for value in text.split(",") if value)
        if not key or not values:
            problems.append(f"--settings {word}: expected key=value,value")
        elif _step_of(key) not in (None, *steps):
            problems.append(f"--settings {word}: '{_step_of(key)}' is not among the --steps")
        else:
            choices[key] = values
    return choices, problems


def _step_of(key: str) -> str | None:
    """The compression step that a key belongs to.

    >>> _step_of("compression.prune.ratio"), _step_of("train.epochs")
    ('prune', None)
    """
    parts = key.split(".")
    return parts[1] if parts[0] == "compression" and len(parts) > 2 else None
