"""How Ray Serve's controller sees an application: what `serve.status` tells of it, for a twentieth of its time. That
builds a schema of all that is deployed, for which it imports and pickles each deployment's request router again, 10 ms
of the interpreter per deployment; servers ask twice a second in the process that also answers requests.
"""

from __future__ import annotations

from collections import Counter

from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview


def read_application(name: str) -> ApplicationStatusOverview | None:
    """Returns the status of an application and of its deployments, None where Serve or the application does not run.

    Blocking. Raises RayError where the controller does not answer.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    told = client.get_serve_details()["applications"].get(name) if client else None
    if told is None:
        return None
    deployments = {
        deployment: DeploymentStatusOverview(
            status=each["status"],
            status_trigger=each["status_trigger"],
            replica_states=dict(Counter(replica["state"] for replica in each["replicas"])),
            message=each["message"],
        )
        for deployment, each in told["deployments"].items()
    }
    return ApplicationStatusOverview(told["status"], told["message"], told["last_deployed_time_s"], deployments)
