"""Reproducible measurements: ratios between two sides of one run, with the environment they came from."""
