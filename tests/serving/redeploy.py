"""A program that deploys a running server's application again, with other settings of all models.

The changed settings are an argument, as JSON. The program connects to the server's Ray and acts like `serve deploy`
with a changed file.
"""

from __future__ import annotations

import json
import sys

import ray
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema


def main(address: str, application: str, changes: str) -> None:
    ray.init(address=address, log_to_driver=False)
    client = _get_global_client()
    config = client.get_serve_details()["applications"][application]["deployed_app_config"]
    for model in config["args"]["models"]:
        model.update(json.loads(changes))
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [config]}), _blocking=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
