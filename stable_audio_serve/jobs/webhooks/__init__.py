"""Webhooks: when a job ends, the server sends a request to a URL that the client has chosen."""
