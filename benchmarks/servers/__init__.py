"""Starts the servers that benchmarks measure, as child processes, and defines special replicas for them."""
