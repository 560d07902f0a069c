"""Images in: one file a source, each a function that returns an `ImageData`."""
