"""The parts of Ray outside its public API that this package uses. Tested with the Ray versions in `TESTED`.

At the start, the server calls `require`, which raises an error if the installed Ray lacks one of these parts.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stable_audio_serve.core.errors import StartError

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.serve.schema import ServeDeploySchema

TESTED = ("2.60",)

_NEEDED = {  # names that must exist, by module; a name with a dot is an attribute of another name
    "ray.serve.context": ("_get_global_client",),
    "ray.serve._private.client": (
        "ServeControllerClient.deploy_apps",
        "ServeControllerClient.get_serve_details",
    ),
    "ray.serve._private.constants": ("SERVE_CONTROLLER_NAME", "SERVE_NAMESPACE"),
    "ray.serve._private.replica": ("Replica",),
    "ray._private.worker": ("global_worker.actors",),
}


def require() -> None:
    """Raise StartError if the installed Ray lacks a name in `_NEEDED`."""
    import ray

    for module, names in _NEEDED.items():
        for name in names:
            if not _has(module, name):
                raise StartError(
                    f"Ray {ray.__version__} has no {module}.{name}, which this server uses; it is tested with Ray "
                    f"{' and '.join(TESTED)}: install the versions of constraints.txt"
                )


def deploy(schema: ServeDeploySchema) -> None:
    """Deploy the applications of a config file, like the command `serve deploy`.

    Works only in the process that started Ray Serve.
    """
    from ray.serve.context import _get_global_client

    _get_global_client().deploy_apps(schema)


def application_details(name: str) -> Mapping[str, Any] | None:
    """Return the details that Ray Serve's controller has of an application, or None if the application does not run.

    Blocking. Raises RayError if the controller does not answer.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return client.get_serve_details()["applications"].get(name) if client else None


def find_controller() -> ActorHandle | None:
    """Return the handle of Ray Serve's controller, or None if the controller does not run."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def is_replica_stopping() -> bool:
    """Return True if Ray Serve has begun to stop the replica in this process."""
    import ray

    worker = ray._private.worker.global_worker
    return bool(worker.actors[worker.actor_id]._replica_impl._shutting_down)


def has_haproxy() -> bool:
    """Return True if Ray Serve uses HAProxy as its proxy."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def haproxy_stats_port() -> int:
    """Return the port of HAProxy's statistics page."""
    return int(os.environ.get("RAY_SERVE_HAPROXY_STATS_PORT", "8404"))


def _has(module: str, name: str) -> bool:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return True
