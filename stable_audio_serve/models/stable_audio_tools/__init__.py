"""Stable Audio Open models on the networks of the package stable-audio-tools, for configs that our own cannot build."""
