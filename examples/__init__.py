"""Programs that show how to use the server and its models."""
