"""The Ray Serve application: the deployments, their placement, and the API's backend, which calls model deployments."""
