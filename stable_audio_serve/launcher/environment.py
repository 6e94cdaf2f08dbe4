"""Environment variables of an embedded Ray: ports, file locations, proxy kind, authentication.

Ray Serve reads its environment at import, so these functions run before that. This module must not import Ray.
"""

from __future__ import annotations

import errno
import ipaddress
import math
import os
import random
import resource
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving import haproxy

# The range is below the kernel's ephemeral ports, so that no outgoing connection takes a port after we found it free.
# It is above the worker ports of `ray start` (10002-19999).
_FIRST_PORT = 20000
_LAST_PORT = 32000
# Ports per server: one each for the claim, statistics, metrics and two fallback proxies, the rest for ingress replicas.
# Replicas need many, because a port is used again only after `api.max_deadline_s` (an hour by default).
_BLOCK = 128
_ATTEMPTS = 50
_QUARANTINE_MARGIN_S = 30
LOOPBACK = "127.0.0.1"
_LOCAL_NAMES = "localhost,127.0.0.1,::1"
_ALL_IPV4 = "0.0.0.0"
_MOST_FILES = 65_536  # some programs allocate a table with one entry per allowed file
_BINARY_CHECK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class PortBlock:
    """Consecutive free ports of one server. The launcher keeps `claim` bound to mark the block as taken."""

    claim: int

    @property
    def haproxy_stats(self) -> int:
        """HAProxy's statistics page."""
        return self.claim + 1

    @property
    def haproxy_metrics(self) -> int:
        """HAProxy's Prometheus page. HAProxy needs this port even when its metrics are disabled."""
        return self.claim + 2

    @property
    def fallback_http(self) -> int:
        """The Python proxy behind HAProxy, used while no ingress replica answers."""
        return self.claim + 3

    @property
    def fallback_grpc(self) -> int:
        """The gRPC server of that Python proxy."""
        return self.claim + 4

    @property
    def replicas(self) -> tuple[int, int]:
        """Ports of the ingress replicas' HTTP servers: the first, and one past the last."""
        return self.claim + 5, self.claim + _BLOCK


@contextmanager
def claim_ports(host: str) -> Iterator[PortBlock]:
    """Reserve a block of free ports until the context ends. Raises OSError when none is found.

    `host` is the address of HAProxy's statistics and metrics pages. The other ports are used on loopback.
    """
    host = _ALL_IPV4 if ":" in host else host
    for _ in range(_ATTEMPTS):
        first = random.randrange(_FIRST_PORT, _LAST_PORT, _BLOCK)
        claim = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with claim:
            try:
                claim.bind((host, first))
                claim.listen(1)  # otherwise another socket with SO_REUSEADDR could bind to this port too
            except OSError:
                continue
            if all(is_port_free(host, port) for port in range(first + 1, first + _BLOCK)):
                yield PortBlock(first)
                return
    raise OSError(f"no {_BLOCK} consecutive free ports between {_FIRST_PORT} and {_LAST_PORT}")


def is_port_free(host: str, port: int) -> bool:
    """Whether a server could listen on this address now."""
    try:
        _try_to_bind(host, port)
    except OSError:
        return False
    return True


def require_free_port(host: str, port: int, *, option: str = "--port (PORT=) or --host", field: str = "port") -> None:
    """Raise ConfigError, naming the option to change, when the server cannot listen on this address."""
    try:
        _try_to_bind(host, port)
    except OSError as error:
        reason = "it is already in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise ConfigError(
            f"cannot listen on port {port} of {host}: {reason}; choose another with {option}",
            field=field,
        ) from error


def _try_to_bind(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        probe.bind((host, port))


def is_loopback(host: str) -> bool:
    """Whether an address or host name is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def haproxy_problem() -> str | None:
    """Return the reason why HAProxy cannot run on this machine, or None if it can."""
    if not sys.platform.startswith("linux"):
        return f"HAProxy mode needs Linux, this is {sys.platform}"
    try:
        binary = haproxy.find_binary()
        subprocess.run([binary, "-v"], check=True, capture_output=True, timeout=_BINARY_CHECK_TIMEOUT_S)
    except FileNotFoundError as error:
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{binary} does not run here: {error}"
    return None


def raise_file_limit() -> None:
    """Raise the limit of open files, and so of connections, up to the hard limit or `_MOST_FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def base_environment(settings: Settings) -> dict[str, str]:
    """Return the variables for every embedded Ray: its own token, no usage statistics, fast health checks and stop."""
    return {
        # Ray's own ports listen on loopback with 0 and on all interfaces with 1, on Linux too, despite the name.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if is_loopback(settings.metrics.host) else "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_AUTO_CONNECT": "0",  # a late call from a thread of Serve would start another Ray
        "RAY_DEDUP_LOGS": "0",
        "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "stable_audio_serve.serving.logs.tidy_controller_log",
        "RAY_memory_monitor_refresh_ms": "0",  # memory use of other programs must not kill replicas
        # Otherwise gRPC would send Ray's local metrics traffic through the outgoing proxy.
        "no_proxy": ",".join(filter(None, (os.environ.get("no_proxy", os.environ.get("NO_PROXY")), _LOCAL_NAMES))),
        # Kill a replica that fails its health check immediately, without a grace period.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        "RAY_worker_niceness": "0",  # by default Ray gives its workers, and so our replicas, a low priority
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
        # Serve replaces a proxy after three failed checks in a row. A check of a dead proxy fails immediately, a check
        # of a slow one after the timeout.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.3",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    }


def color_environment() -> dict[str, str]:
    """Return the variable that turns off Ray's colour codes, or nothing when the output goes to a terminal."""
    return {} if sys.stdout.isatty() and sys.stderr.isatty() else {"RAY_COLOR_PREFIX": "0"}


def haproxy_environment(ports: PortBlock, directory: Path, *, host: str, settings: Settings) -> dict[str, str]:
    """Return the variables of HAProxy mode on one machine, with this server's own ports and files.

    HAProxy listens on `host`. Ray listens on loopback, so that clients cannot bypass HAProxy. Raises OSError when
    HAProxy is not installed or cannot run.
    """
    first_replica, last_replica = ports.replicas
    longest_s = math.ceil(settings.api.max_deadline_s)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": _program(directory),
        haproxy.BINARY: haproxy.find_binary(),
        haproxy.PUBLIC_HOST: host,
        haproxy.HEADER_TIMEOUT_S: str(settings.proxy.header_timeout_s),
        haproxy.IDLE_TIMEOUT_S: str(settings.proxy.idle_timeout_s),
        haproxy.METRICS_HOST: settings.metrics.host,
        # After a reload, the old HAProxy process finishes its requests. It may still forward to a port of a stopped
        # replica, so no new replica gets that port before the old process has ended.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(longest_s),
        "RAY_SERVE_PORT_QUARANTINE_S": str(longest_s + _QUARANTINE_MARGIN_S),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_replica),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(last_replica),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
    }


def _program(directory: Path) -> str:
    """Write the script that Ray runs as HAProxy, and return its path. It skips site packages, so it starts quickly.

    Returns the path of `stable-audio-haproxy` when programs cannot run in `directory`. Raises OSError when that is not
    installed.
    """
    path = directory / "haproxy"
    words = (sys.executable, "-I", "-S", haproxy.__file__)
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    path.chmod(0o700)
    if os.access(path, os.X_OK):
        return str(path)
    if installed := shutil.which("stable-audio-haproxy", path=sysconfig.get_path("scripts")):
        return installed
    raise OSError(f"programs cannot run in {directory.parent} (noexec), and stable-audio-haproxy is not installed")
