"""Webhooks: HTTP calls to clients' URLs when a job ends."""
