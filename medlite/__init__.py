"""medlite: which light model, compressed how, on which runtime, is good enough here."""

__version__ = "0.1.0"
