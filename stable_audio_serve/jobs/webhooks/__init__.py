"""Webhooks: calls to URLs that clients choose."""
