"""Ray Serve: deployments, placement, the launcher. The only folder that imports Ray."""
