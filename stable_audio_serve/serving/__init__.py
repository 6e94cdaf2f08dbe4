"""The Ray Serve application: its deployments, their placement, and the backend through which the API calls models."""
