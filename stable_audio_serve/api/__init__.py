"""HTTP only: the FastAPI application, request limits, error bodies. Runs on any Backend."""
