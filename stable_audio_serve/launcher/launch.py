"""`stable-audio-serve serve`: start the server from a config file and stop it on Ctrl-C.

This module carries out the steps of the start and prints progress for the operator. The module `embedded` starts and
stops Ray, and `signals` handles signals.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from stable_audio_serve.api.middleware.key_ring import check_key_file
from stable_audio_serve.core.errors import ConfigError, ModelUnavailableError, StableAudioError
from stable_audio_serve.core.setting_types import ProxyKind
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.settings_sources import load_settings
from stable_audio_serve.jobs.open import prepare_stores
from stable_audio_serve.launcher import environment
from stable_audio_serve.launcher.embedded import (
    apply_environment,
    embedded_ray,
    exiting_after,
    private_directory,
    start_errors,
)
from stable_audio_serve.launcher.signals import StopSignals
from stable_audio_serve.launcher.start_timeouts import load_per_core, start_timeouts
from stable_audio_serve.models.registry import ModelEntry
from stable_audio_serve.serving.placement import INGRESS_NAME, RUNNER_NAME, Plan, plan_deployments
from stable_audio_serve.serving.preflight import describe_downloads, entries_to_download, require_weights
from stable_audio_serve.serving.reservations import node_slots, require_room
from stable_audio_serve.serving.serve_file import ServeFile, deploy_schema

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview, ServeDeploySchema

Report = Callable[[str], None]

_POLL_S = 0.1
_HEALTH_TIMEOUT_S = 5.0
_STILL_LOADING_EVERY_S = 15.0
# How long the drain may take beyond `drain_s`. Its last calls to Ray Serve have timeouts of their own: 8 s in all.
_DRAIN_MARGIN_S = 15.0
# HAProxy cannot run: the error of our program that starts it, or HAProxy's own message among its other output.
_PROXY_FAULT = re.compile(r"HAProxy crashed during startup: (?:error: (.+)|(?s:.*?): (cannot bind socket .+))")
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
_OUR_ERROR = re.compile(r"stable_audio_serve\.core\.errors\.\w+: (.+)")


class Stopwatch:
    """Measures the stages of a cold start."""

    def __init__(self) -> None:
        self._laps = [("", time.monotonic())]  # the names and ends of the stages

    def lap(self, name: str) -> None:
        """End the stage `name`."""
        self._laps.append((name, time.monotonic()))

    def __str__(self) -> str:
        return ", ".join(f"{name} {end - start:.1f} s" for (_, start), (name, end) in pairwise(self._laps))


def serve(
    file: ServeFile,
    *,
    host: str | None,
    port: int | None,
    metrics_port: int | None,
    proxy: ProxyKind | None,
    report: Report,
    print_error: Report,
) -> None:
    """Start the server, run it until this process receives SIGINT, SIGTERM or SIGHUP, and stop it.

    If the server cannot start, passes one sentence with the reason to `print_error` and raises an error of
    `core.errors`. Progress is passed to `report`.
    """
    watch = Stopwatch()
    with ExitStack() as stack:
        with _printing_errors(print_error):
            host, port = host or file.host, port or file.port
            plan = plan_deployments(load_settings(file.args))
            check_key_file(plan.settings.api.key_file)
            metrics = plan.settings.metrics
            metrics_port = metrics_port or metrics.port
            environment.require_free_ports(host, port, metrics_host=metrics.host, metrics_port=metrics_port)
            signals = StopSignals()
            signals.listen()
            directory = stack.enter_context(private_directory())
            environment.raise_file_limit()
            variables = environment.base_environment(plan.settings)
            kind = proxy or plan.settings.proxy.kind
            proxied = _proxy_environment(
                stack,
                directory,
                host=host,
                own_ports=(port, metrics_port),
                settings=plan.settings,
                proxy=kind,
                report=report,
            )
            defaults = start_timeouts(load_per_core()) | environment.color_environment()
            apply_environment(variables | proxied, defaults=defaults)
            # With HAProxy, Ray's own proxy must listen on loopback only. `deploy_schema` also finds misspelled keys in
            # the config file. It must run before the next line: if the key `args` is misspelled, that line would report
            # the default model instead of the configured one.
            schema = deploy_schema(file, host=environment.LOOPBACK if proxied else host, port=port)
            report(f"default model: {plan.catalog.default.name}")
            # Models that start later are not checked here: their weights are checked when they load.
            started = [model for model in plan.settings.models if model.name in plan.started]
            require_weights(plan, started, print_error=print_error)
            if missing := entries_to_download(started):
                report(f"the files of {', '.join(missing)} are downloaded first, which may take many minutes")
            report(prepare_stores(plan.settings).description)

        # A thread of Ray prints log lines. It writes the text of a line and the newline separately. An error message
        # may be printed in between, so it must begin with a newline of its own.
        def print_error_on_new_line(sentence: str) -> None:
            print_error(f"\n{sentence}")

        with _printing_errors(print_error_on_new_line):
            metrics_port = stack.enter_context(
                embedded_ray(directory, signals, num_cpus=plan.num_cpus, metrics_port=metrics_port)
            )
        stack.enter_context(suppress(KeyboardInterrupt))
        stack.callback(report, "stopping ...")
        stack.enter_context(_printing_errors(print_error_on_new_line))
        watch.lap("ray")
        url = f"http://{_reachable(host)}:{port}{file.route_prefix}"
        with start_errors("Ray Serve"):
            _require_room(plan)
            _deploy(schema, watch)
            _wait_until_ready(file, url, plan=plan, downloads=missing, signals=signals, report=report)
        watch.lap("models")
        report(f"cold start: {watch}")
        report(f"metrics: http://{_reachable(plan.settings.metrics.host)}:{metrics_port}/metrics")
        report(_ready_text(url, plan))
        with suppress(KeyboardInterrupt):
            signals.wait()
        _drain(file.application, plan.settings, report=report)


@contextmanager
def _printing_errors(print_error: Report) -> Iterator[None]:
    """Print an error at once, before the server is stopped, because the stop may take seconds or be cut short."""
    try:
        yield
    except StableAudioError as error:
        print_error(f"error: {error.message}")
        raise


def _proxy_environment(
    stack: ExitStack,
    directory: Path,
    *,
    host: str,
    own_ports: tuple[int | None, ...],
    settings: Settings,
    proxy: ProxyKind,
    report: Report,
) -> dict[str, str]:
    """Return the environment variables for HAProxy, or no variables if the Python proxy is used.

    HAProxy's ports stay reserved until `stack` is closed. Raises ConfigError if `proxy` is "haproxy" and HAProxy cannot
    run.
    """
    reason = "selected" if proxy == "python" else environment.haproxy_problem()
    if reason is None:
        try:
            ports = stack.enter_context(environment.claim_ports(settings.metrics.host, without=own_ports))
            return environment.haproxy_environment(ports, directory, host=host, settings=settings)
        except OSError as error:
            reason = str(error)
    if proxy == "haproxy":
        raise ConfigError(f"proxy.kind (STABLE_AUDIO_PROXY, --proxy) is haproxy: {reason}", field="proxy.kind")
    report(f"using Ray Serve's Python proxy instead of HAProxy: {reason}")
    return {}


def _require_room(plan: Plan) -> None:
    import ray

    cluster_gpus = float(ray.cluster_resources().get("GPU", 0.0))
    require_room(plan.settings, node_slots(ray.nodes()), least=plan.least_replicas, cluster_gpus=cluster_gpus)


def _deploy(schema: ServeDeploySchema, watch: Stopwatch) -> None:
    import ray
    from ray import serve
    from ray.exceptions import RayError

    from stable_audio_serve.serving import ray_internals

    ray_internals.require()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # Ray Serve builds the application in a worker process of Ray, where the import of this module takes two seconds.
    # This task imports it in such a process while Ray Serve starts.
    ray.remote(num_cpus=0, max_retries=0)(importlib.import_module).remote("stable_audio_serve.serving.app")
    try:
        serve.start(
            proxy_location=schema.proxy_location,
            http_options=schema.http_options.model_dump(),
            logging_config=schema.logging_config,
        )
    except RayError as error:
        if fault := find_proxy_fault(str(error)):
            raise ConfigError(fault, field="proxy") from error
        raise
    watch.lap("serve")
    ray_internals.deploy(schema)


def find_proxy_fault(error: str) -> str | None:
    """Return why HAProxy could not start, from the text of Ray Serve's error, or None if HAProxy is not the reason."""
    fault = _PROXY_FAULT.search(error)
    return fault and (fault[1] or f"HAProxy {fault[2]}")


def _wait_until_ready(
    file: ServeFile,
    url: str,
    *,
    plan: Plan,
    downloads: Mapping[str, ModelEntry],
    signals: StopSignals,
    report: Report,
) -> None:
    """Wait until the preloaded models' replicas run and /health says so.

    Reports now and then that models are loading, and how much of `downloads` is on this machine.
    """
    from stable_audio_serve.serving.model_states import read_application

    next_report_at = time.monotonic() + _STILL_LOADING_EVERY_S
    while True:
        application = read_application(file.application)
        if application is not None:
            raise_if_failed(application, plan)
            if application.status in ("RUNNING", *_FAILED) and _is_ready(url, plan):
                return
        if time.monotonic() >= next_report_at:
            report(describe_wait(application, plan, downloads=downloads))
            next_report_at += _STILL_LOADING_EVERY_S
        signals.wait(_POLL_S)


def describe_wait(
    application: ApplicationStatusOverview | None, plan: Plan, *, downloads: Mapping[str, ModelEntry]
) -> str:
    """Return the line that names the models that are not loaded yet, and how much of `downloads` is on this machine."""
    deployments = application.deployments if application is not None else {}
    loaded = {name for name, deployment in deployments.items() if deployment.status == "HEALTHY"}
    waiting = [name for name in plan.preloaded if name not in loaded]
    so_far = describe_downloads(downloads)
    line = f"still loading {', '.join(waiting)} ..." if waiting else "still starting ..."
    return f"{line} ({so_far} downloaded)" if so_far else line


def raise_if_failed(application: ApplicationStatusOverview, plan: Plan) -> None:
    """Raise ModelUnavailableError if the application has failed.

    A model that no replica serves from the start does not count: a request or a waiting job may have started it.
    """
    if application.status not in _FAILED:
        return
    failed = {name for name, deployment in application.deployments.items() if deployment.status in _FAILED}
    if failed and failed.isdisjoint({INGRESS_NAME, RUNNER_NAME, *plan.started}):
        return
    reason = application.message.rstrip().rpartition("\n")[2]  # without the traceback above it
    messages = [reason, *(d.message for d in application.deployments.values())]
    ours = [match for message in messages for match in _OUR_ERROR.findall(message)]
    raise ModelUnavailableError(ours[-1] if ours else "\n".join(filter(None, messages)))


def _is_ready(url: str, plan: Plan) -> bool:
    """Return True if every preloaded model is loaded and has published its statistics, according to /sa3/health.

    The status of /sa3/health is 200 even if all models failed.
    """
    try:
        # With `trust_env=False`, httpx ignores environment variables that name a proxy for outgoing requests.
        answer = httpx.get(f"{url}/sa3/health", timeout=_HEALTH_TIMEOUT_S, trust_env=False)
        models = answer.raise_for_status().json()["models"]
    except (httpx.HTTPError, ValueError):
        return False
    return all(models[name]["stage"] == "ready" and models[name]["device"] for name in plan.preloaded)


def _drain(application: str, settings: Settings, *, report: Report) -> None:
    """Refuse new requests, and wait up to `settings.drain_s` for the requests in progress.

    Some calls of Ray Serve wait for its controller without a timeout. If the controller does not answer, this process
    exits `_DRAIN_MARGIN_S` seconds after `settings.drain_s`.
    """
    from stable_audio_serve.serving.draining import drain

    if settings.drain_s:
        host = _reachable(settings.metrics.host)

        def give_up() -> None:
            report("Ray Serve's controller does not answer: exiting without it")

        with exiting_after(settings.drain_s + _DRAIN_MARGIN_S, exit_code=0, report=give_up):
            drain(application, within_s=settings.drain_s, statistics_host=host, report=report)


def _ready_text(url: str, plan: Plan) -> str:
    body = json.dumps({"prompt": "a 440 Hz sine tone, fading out", "duration": 3})
    key = ' -H "Authorization: Bearer $KEY"' if plan.settings.api.has_keys else ""
    return (
        f"ready: {url} serves {', '.join(plan.names)} (Ctrl-C stops it). Open {url}/ in a browser, or try:\n"
        f"  curl -fsS {url}/v1/audio/generations{key} -H 'Content-Type: application/json' -d '{body}' -o clip.wav"
    )


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
