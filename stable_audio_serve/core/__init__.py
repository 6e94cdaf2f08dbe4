"""Types that every layer uses: requests, results, errors, clock, metrics and settings."""
