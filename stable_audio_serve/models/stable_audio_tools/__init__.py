"""Runs Stable Audio Open models with the package stable-audio-tools, if `models.sao` does not support their config."""
