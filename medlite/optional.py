"""Packages that only some users need."""

from __future__ import annotations

import importlib
from types import ModuleType

from medlite.errors import MissingDependency


def require(module: str, *, extra: str, needed_by: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises:
        MissingDependency: the package is not installed.

    >>> require("math", extra="none", needed_by="arithmetic").sqrt(4.0)
    2.0
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise
        message = f"{needed_by} needs '{module}'; install it with: pip install 'medlite[{extra}]'"
        raise MissingDependency(message) from error
