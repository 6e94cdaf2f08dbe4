"""Stable Audio Open models on the networks of stable-audio-tools, for configs that our own networks do not support."""
