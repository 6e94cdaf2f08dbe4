"""The orderly end of a served application: nothing new, jobs back into the queue, answers in flight awaited.

Told from outside by the launcher, which is about to stop Ray; and noticed from inside by a replica that Ray Serve
is about to stop. Looks only at requests: stopping processes is Ray Serve's own business.
"""

from __future__ import annotations

import asyncio
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

_LOOK_S = 0.1
_CALL_TIMEOUT_S = 2.0


def drain(application: str, *, within_s: float, statistics_host: str, report: Callable[[str], None]) -> None:
    """Refuse what is new and put jobs back at once, then wait until no answer is in flight, `within_s` at most.

    `statistics_host` is where HAProxy, if there is one, shows its statistics.
    """
    with _handle(INGRESS_NAME, application) as ingress, _handle(RUNNER_NAME, application) as runner:
        _drain(ingress, runner, within_s=within_s, statistics_host=statistics_host, report=report)


@contextmanager
def _handle(name: str, application: str) -> Iterator[DeploymentHandle]:
    """A handle whose router ends with the context: else it goes on calling the controller, also after Ray's end."""
    handle = serve.get_deployment_handle(name, application)
    try:
        yield handle
    finally:
        handle.shutdown()


def _drain(
    ingress: DeploymentHandle,
    runner: DeploymentHandle,
    *,
    within_s: float,
    statistics_host: str,
    report: Callable[[str], None],
) -> None:
    deadline_at = time.monotonic() + within_s
    proxies = _python_proxies()
    for proxy in proxies:  # from now on it says whether it has sent everything
        proxy.update_draining.remote(True)
    has_reported = False
    while True:
        num_in_flight = sum(_broadcast(ingress))
        _broadcast(runner)
        if not num_in_flight and not _num_in_haproxy(statistics_host) and _are_drained(proxies):
            return
        if time.monotonic() >= deadline_at:
            report(f"cutting off what is still in flight after {within_s:g} s")
            return
        if num_in_flight and not has_reported:
            has_reported = True
            report(f"finishing {num_in_flight} requests within {within_s:g} s (a second signal stops at once) ...")
        time.sleep(_LOOK_S)


def _broadcast(handle: DeploymentHandle) -> Sequence[int]:
    """What every replica answers to `drain`: one just started is told now, one that has died holds nothing.

    One that is too slow to answer may hold something, and counts as one.
    """
    try:
        answers = handle.broadcast("drain").results(timeout_s=_CALL_TIMEOUT_S, return_exceptions=True)
    except (TimeoutError, RayError, RayServeException) as error:
        logger.debug("a deployment does not answer: %s", error)
        answers = [error]
    return [answer if isinstance(answer, int) else int(isinstance(answer, TimeoutError)) for answer in answers]


def _num_in_haproxy(host: str) -> int:
    """Answers that HAProxy has not sent to the end, by its own statistics; it buffers what clients read slowly."""
    if not ray_internals.has_haproxy():
        return 0
    url = f"http://{host}:{ray_internals.haproxy_stats_port()}/stats;csv"
    try:
        page = httpx.get(url, timeout=_CALL_TIMEOUT_S, trust_env=False).raise_for_status().text
    except httpx.HTTPError as error:
        logger.debug("HAProxy does not answer: %s", error)
        return 0
    rows = csv.DictReader(page.removeprefix("# ").splitlines())
    return sum(int(row["scur"]) for row in rows if row["svname"] == "BACKEND" and row["pxname"] != "stats")


def _python_proxies() -> Sequence[ActorHandle]:
    """Those of Ray Serve's own; beside HAProxy that is the one that stands in for the ingress while there is none.

    An HAProxy told to drain waits for idle connections, too.
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
    """Whether they have sent everything; one that is dead has nothing to send."""
    try:
        return all(ray.get([proxy.is_drained.remote() for proxy in proxies], timeout=_CALL_TIMEOUT_S))
    except TimeoutError:
        return False
    except RayError as error:
        logger.debug("a proxy is gone: %s", error)
        return True


async def replaced(*, look_every_s: float) -> None:
    """Return when Ray Serve has begun to stop the replica that this runs in."""
    while not ray_internals.is_replica_stopping():  # noqa: ASYNC110  it is not ours to signal
        await asyncio.sleep(look_every_s)
