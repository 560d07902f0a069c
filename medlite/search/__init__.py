"""The search for a recipe: which compression steps, in which order, with which settings."""
