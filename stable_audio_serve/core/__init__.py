"""The small vocabulary every layer shares: requests, results, errors, clock, metrics, settings."""
