"""The Ray Serve application: deployments, their placement, and the API's backend over model handles."""
