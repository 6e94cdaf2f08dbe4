"""Time limits for the start of Ray, as environment variables. They grow with the load of the machine.

Ray's default limits suit an idle machine. Ray reads the variables when it is imported, so this module must not import
Ray.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

_LOADAVG = Path("/proc/loadavg")
_MIN_FACTOR = 2.0  # not 1, because an idle machine may be busy a second later
_MAX_FACTOR = 30.0
_BUSY = 4.0  # runnable programs per core; at this load or above, `start_advice` mentions the load

# How long to wait for the raylet, Ray's process on each node. The raylet exits if its helper processes do not start
# within 15 s. This limit cannot be changed, so a longer wait for the raylet would only delay the error message.
_RAYLET_S = 60
# Ray's other time limits, in seconds. RAY_NUM_REDIS_GET_RETRIES is a number of retries, each of about a second.
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


def load_per_core() -> float:
    """Return the number of runnable programs per core, or 0 if it is unknown.

    This is the current number or the average of the last minute, whichever is higher.
    """
    try:
        minute, _, _, now, _ = _LOADAVG.read_text().split()
    except (OSError, ValueError):
        return 0.0
    runnable = max(float(minute), float(now.partition("/")[0]))
    return runnable / (os.cpu_count() or 1)


def start_timeouts(load: float) -> dict[str, str]:
    """Return the environment variables for Ray's time limits. `load` is the number of runnable programs per core."""
    factor = min(max(load, _MIN_FACTOR), _MAX_FACTOR)
    limits = {name: str(math.ceil(limit * factor)) for name, limit in _LIMITS.items()}
    return {"RAY_raylet_start_wait_time_s": str(_RAYLET_S), **limits}


def start_advice(load: float) -> str:
    """Return a sentence on what to try after a failed start. `load` is the number of runnable programs per core."""
    if load < _BUSY:
        return "try again, and check the free memory and disk space of this machine"
    runnable, cores = round(load * (os.cpu_count() or 1)), os.cpu_count()
    return f"about {runnable} programs compete for the {cores} cores of this machine: stop some of them and try again"
