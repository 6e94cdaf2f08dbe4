"""Background jobs: their data classes, database, runners and webhooks. Independent of GPUs and of the HTTP API."""
