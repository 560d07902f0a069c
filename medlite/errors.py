"""Every error that a user can cause, and the words that help to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_UNSAFE = 3
"""how a command ends where safety is enforced and a deployed model fails it or cannot run"""


class MedliteError(Exception):
    """A mistake or a limit that the user can act on; shown without a traceback."""


class ConfigError(MedliteError):
    """One or more wrong values in the configuration, all listed at once."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"the config has {count} error{'s' * (count != 1)}:\n{lines}")


class DataError(MedliteError):
    """Missing, corrupt or mismatched data, with every path that is concerned."""


class ShapeError(MedliteError):
    """An input size that a model cannot take, with one that it can.

    Args:
        problem: what was given, and what the model needs.
        size: (H, W[, D]) that would do; None where it is not the size that is wrong.
        divisor: of the sides of whatever else would do.
    """

    def __init__(
        self, problem: str, *, size: Sequence[int] | None = None, divisor: int = 1
    ) -> None:
        self.problem = problem
        self.size = None if size is None else tuple(size)
        self.divisor = divisor
        super().__init__(problem if size is None else f"{problem}; set {_image_size(size)}")


class MissingDependency(MedliteError):  # noqa: N818 - reads as what it is
    """An optional package that is not installed, with the command that brings it."""


class TrainingError(MedliteError):
    """Training cannot go on, for example because the loss is not finite."""


class ExportError(MedliteError):
    """A model that a format or runtime cannot hold, with the operator concerned."""


class BenchmarkError(MedliteError):
    """A measurement process that failed, with what it printed."""


class RecordError(MedliteError):
    """A run directory or result file that cannot be used."""


def _image_size(size: Sequence[int]) -> str:
    """The override that asks for `size`; a number alone means a square."""
    if len(size) == 2 and size[0] == size[1]:
        return f"dataset.image_size={size[0]}"
    return f"'dataset.image_size=[{','.join(map(str, size))}]'"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A hint that names the closest option, or lists them all when none is close.

    >>> did_you_mean("widht", ["width", "depth"])
    "did you mean 'width'?"
    """
    names = sorted(options)
    closest = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if closest:
        return f"did you mean '{closest[0]}'?"
    return f"the options are: {', '.join(names)}" if names else "there are no options"
