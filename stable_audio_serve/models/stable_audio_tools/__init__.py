"""Runs Stable Audio Open models with the package stable-audio-tools, for configs that `models.sao` does not support."""
