"""How options name layers: by runs of whole components of their paths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from medlite.errors import MedliteError, did_you_mean


def matches(name: str, path: str) -> bool:
    """Whether `name` is a run of whole components of `path`.

    >>> matches("fc", "head.fc"), matches("fc", "fc.0"), matches("fc", "head.fc2")
    (True, True, False)
    """
    return f".{name}." in f".{path}."


def check_names(option: str, names: Iterable[str], paths: Sequence[str]) -> None:
    """Refuse names that match none of the paths.

    Raises:
        MedliteError: names the option, and the path closest to the name.
    """
    for name in names:
        if not any(matches(name, path) for path in paths):
            message = f"{option}: no layer is called '{name}', {did_you_mean(name, paths)}"
            raise MedliteError(message)
