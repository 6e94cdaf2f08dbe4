"""Background jobs: their values, store, runners and webhooks. Independent of GPUs and HTTP."""
