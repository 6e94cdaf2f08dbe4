"""Finish the work of a served application before it is stopped.

New requests are refused, jobs go back into the queue, and requests in flight are finished. The launcher calls `drain`
before it stops Ray.
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from stable_audio_serve.serving import ray_internals
from stable_audio_serve.serving.placement import INGRESS_NAME, RUNNER_NAME

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_CALL_TIMEOUT_S = 2.0


def drain(application: str, *, within_s: float, statistics_host: str, report: Callable[[str], None]) -> None:
    """Refuse new requests and put jobs back into the queue, then wait up to `within_s` for those in progress.

    `statistics_host` is the address of HAProxy's statistics page, if HAProxy runs. `report` receives progress messages.
    """
    with _handle(INGRESS_NAME, application) as ingress, _handle(RUNNER_NAME, application) as runner:
        deadline_at = time.monotonic() + within_s
        proxies = _python_proxies()
        # A proxy's `is_drained` considers only requests that the proxy received before this call.
        for proxy in proxies:
            proxy.update_draining.remote(True)
        if any(_broadcast(ingress)):  # a number would not be that of the requests: an idle replica may answer 1
            report(f"finishing current requests within {within_s:g} s (a second signal stops at once) ...")
        while True:
            num_left = sum(_broadcast(runner)) + sum(_broadcast(ingress))
            if not num_left and not num_in_haproxy(statistics_host) and _are_drained(proxies):
                return
            if time.monotonic() >= deadline_at:
                report(f"cutting off what is still in flight after {within_s:g} s")
                return
            time.sleep(_POLL_S)


@contextmanager
def _handle(name: str, application: str) -> Iterator[DeploymentHandle]:
    """Yield a deployment's handle, and shut the handle down afterwards.

    Otherwise the handle's router would keep calling Ray Serve's controller, even after Ray has stopped.
    """
    handle = serve.get_deployment_handle(name, application)
    try:
        yield handle
    finally:
        handle.shutdown()


def _broadcast(handle: DeploymentHandle) -> Sequence[int]:
    """Call `drain` on every replica, and return how many requests or jobs each of them still has.

    The number is 0 for a dead replica, and 1 for a replica that does not answer in time.
    """
    try:
        answers = handle.broadcast("drain").results(timeout_s=_CALL_TIMEOUT_S, return_exceptions=True)
    except (TimeoutError, RayError, RayServeException) as error:
        logger.debug("a deployment does not answer: %s", error)
        answers = [error]
    return [answer if isinstance(answer, int) else int(isinstance(answer, TimeoutError)) for answer in answers]


def num_in_haproxy(host: str) -> int:
    """Return how many responses HAProxy is still sending, as its statistics page shows.

    A replica may have finished its response long before, because HAProxy buffers responses for slow clients. The number
    is 0 if HAProxy does not run, and 1 if it does not answer in time.
    """
    if not ray_internals.has_haproxy():
        return 0
    url = f"http://{host}:{ray_internals.haproxy_stats_port()}/stats;csv"
    try:
        page = httpx.get(url, timeout=_CALL_TIMEOUT_S, trust_env=False).raise_for_status().text
    except httpx.HTTPError as error:
        logger.debug("HAProxy does not answer: %s", error)
        return int(isinstance(error, httpx.TimeoutException))
    rows = csv.DictReader(page.removeprefix("# ").splitlines())
    return sum(int(row["scur"]) for row in rows if row["svname"] == "BACKEND" and row["pxname"] != "stats")


def _python_proxies() -> Sequence[ActorHandle]:
    """Return Ray Serve's Python proxies.

    With HAProxy, this is only the fallback proxy, which answers while no ingress replica runs. HAProxy is left out:
    its `update_draining` would also wait for idle connections.
    """
    controller = ray_internals.find_controller()
    if controller is None:
        return ()
    try:
        proxies = ray.get(controller.get_proxies.remote(), timeout=_CALL_TIMEOUT_S)
    except (TimeoutError, RayError) as error:
        logger.debug("the controller does not answer: %s", error)
        return ()
    return [proxy for name, proxy in proxies.items() if name.startswith("fallback-") or not ray_internals.has_haproxy()]


def _are_drained(proxies: Sequence[ActorHandle]) -> bool:
    """Return True if the proxies have sent all responses. A dead proxy counts as having sent them."""
    try:
        return all(ray.get([proxy.is_drained.remote() for proxy in proxies], timeout=_CALL_TIMEOUT_S))
    except TimeoutError:
        return False
    except RayError as error:
        logger.debug("a proxy is gone: %s", error)
        return True
