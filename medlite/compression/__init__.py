"""One file a compression step."""
