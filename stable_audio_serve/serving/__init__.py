"""The Ray Serve application: deployments, placement, the backend over model handles."""
