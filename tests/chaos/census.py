"""A program that repeatedly prints one JSON line: the number of running replicas of each deployment of a server.

It connects to the server's Ray and asks Serve's controller. It prints nothing while there is no controller.
"""

from __future__ import annotations

import json
import sys
import time

import ray
from ray import serve

_EVERY_S = 0.25


def main(address: str, application: str) -> None:
    ray.init(address=address, log_to_driver=False)
    while True:
        try:
            deployments = serve.status().applications[application].deployments
        except (ray.exceptions.RayError, KeyError):
            pass
        else:
            running = {name: deployment.replica_states.get("RUNNING", 0) for name, deployment in deployments.items()}
            print(json.dumps(running), flush=True)
        time.sleep(_EVERY_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
