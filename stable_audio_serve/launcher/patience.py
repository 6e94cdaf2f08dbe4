"""How long Ray's own start may take on this machine now: longer where more programs want to run than it has cores.

Ray gives up after fixed times that fit an idle machine. Must not import Ray, which reads its limits at import.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

_LOADAVG = Path("/proc/loadavg")
_LEAST = 2.0  # what is idle now may be busy in a second
_MOST = 30.0
_BUSY = 4.0  # runnable programs per core from which on that is worth a word

# The raylet gives its helpers 15 s to start, which nothing can change, and is dead after that: waiting longer for it
# would only tell the operator later, and no signal ends that wait.
_RAYLET_S = 60
# Ray's other limits of its start: seconds, but for the retries, which take about a second each.
_LIMITS: Mapping[str, float] = {
    "RAY_gcs_server_port_wait_time_s": 30,
    "RAY_gcs_server_request_timeout_seconds": 60,
    "RAY_gcs_rpc_server_connect_timeout_s": 5,
    "RAY_py_gcs_connect_timeout_s": 30,
    "RAY_worker_register_timeout_seconds": 60,
    "RAY_NUM_REDIS_GET_RETRIES": 20,
    "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": 30,
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": 10,
}


def crowding() -> float:
    """Returns the runnable programs per core, now or during the last minute; 0 where that is unknown."""
    try:
        minute, _, _, now, _ = _LOADAVG.read_text().split()
    except (OSError, ValueError):
        return 0.0
    runnable = max(float(minute), float(now.partition("/")[0]))
    return runnable / (os.cpu_count() or 1)


def start_limits(crowding: float) -> dict[str, str]:
    """Returns Ray's time limits at this crowding, as environment variables."""
    factor = min(max(crowding, _LEAST), _MOST)
    limits = {name: str(math.ceil(limit * factor)) for name, limit in _LIMITS.items()}
    return {"RAY_raylet_start_wait_time_s": str(_RAYLET_S), **limits}


def advice(crowding: float) -> str:
    """Returns one sentence on what to do about a start that failed; a guess is marked as one."""
    if crowding < _BUSY:
        return "try again, and look at the free memory and disk of this machine"
    wanted, cores = round(crowding * (os.cpu_count() or 1)), os.cpu_count()
    return f"about {wanted} programs want the {cores} cores of this machine: end some of them, then try again"
