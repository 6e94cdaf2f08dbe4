"""Models of the official sizes with random weights, for benchmarks and tests of sizes."""
