"""A compressed model against its uncompressed self, on the same patients."""
