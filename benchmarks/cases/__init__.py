"""The benchmark cases, one module each. `benchmarks.cli` reads the command line and writes the result files."""
