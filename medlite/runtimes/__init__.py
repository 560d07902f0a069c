"""From Artifact to a callable on numpy arrays, one file a runtime."""
