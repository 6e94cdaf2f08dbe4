"""A program that prints Ray Serve's settings of each deployment of an application as JSON.

It is a separate process, because Ray reads a cluster's secret token only when Ray is imported.
"""

from __future__ import annotations

import json
import sys

import ray
from ray.serve.context import _get_global_client


def main(address: str, application: str) -> None:
    ray.init(address=address, log_to_driver=False)
    deployments = _get_global_client().get_serve_details()["applications"][application]["deployments"]
    print(json.dumps({name: value["deployment_config"] for name, value in deployments.items()}, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
