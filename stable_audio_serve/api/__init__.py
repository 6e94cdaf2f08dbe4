"""The HTTP layer: FastAPI application, request limits, error responses. Runs on any Backend."""
