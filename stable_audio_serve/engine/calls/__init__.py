"""Requests, their rows and the device calls that compute them. Runs on the engine thread."""
