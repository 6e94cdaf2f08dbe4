"""Example programs for the server and its models."""
