"""A program that deploys a running server's application again, with another number of replicas of one deployment.

It connects to the server's Ray and acts like `serve deploy` with a changed file.
"""

from __future__ import annotations

import sys

import ray
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema


def main(address: str, application: str, deployment: str, num_replicas: str) -> None:
    ray.init(address=address, log_to_driver=False)
    client = _get_global_client()
    config = client.get_serve_details()["applications"][application]["deployed_app_config"]
    config["deployments"] = [{"name": deployment, "num_replicas": int(num_replicas)}]
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [config]}), _blocking=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
