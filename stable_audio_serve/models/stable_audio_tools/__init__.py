"""Runs Stable Audio Open models with the package stable-audio-tools, if their config needs networks not built here."""
