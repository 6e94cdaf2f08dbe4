"""A program that prints Ray Serve's settings of each deployment and then, repeatedly, the status of a model's replicas.

It prints JSON lines. It is a separate process, because Ray reads a cluster's secret token only when Ray is imported.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict

import ray
from ray import serve
from ray.serve.context import _get_global_client

from tests.patience import PATIENCE_S


def main(address: str, application: str, model: str) -> None:
    ray.init(address=address, log_to_driver=False)
    deployments = _get_global_client().get_serve_details()["applications"][application]["deployments"]
    print(
        json.dumps({name: value["deployment_config"] for name, value in deployments.items()}, default=str), flush=True
    )
    handle = serve.get_deployment_handle(model, application)
    while True:
        print(json.dumps(asdict(handle.status.remote().result(timeout_s=PATIENCE_S))), flush=True)
        time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
