"""Benchmarks that compare servers or code paths in one run, and store the results with a description of the machine."""
