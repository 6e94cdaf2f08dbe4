"""The HTTP layer: FastAPI application, request limits, error responses. `core.backend.Backend` runs the models."""
