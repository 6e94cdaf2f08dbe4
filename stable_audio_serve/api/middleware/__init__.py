"""Code that runs before the route of every request: limits, origins, API keys, logging, draining."""
