"""Environment variables of an embedded Ray: ports, file locations, kind of proxy, authentication.

Ray Serve reads environment variables when it is imported, so they must be set before. This module must not import Ray.
"""

from __future__ import annotations

import errno
import ipaddress
import math
import os
import random
import re
import resource
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving import haproxy

# The ports of HAProxy and the ingress replicas are in this range. It is below the kernel's ephemeral ports, so that no
# outgoing connection takes a port after it was found free. It is above the ports that workers of `ray start` use
# (10002-19999).
_FIRST_PORT = 20000
_LAST_PORT = 32000
# Number of ports that a server reserves. The first five have the purposes in `haproxy_environment`. The others are for
# ingress replicas, which need many ports: the port of a stopped replica is used again only after `api.max_deadline_s`
# (an hour by default).
_BLOCK = 128
_ATTEMPTS = 50
LOOPBACK = "127.0.0.1"
_LOCAL_NAMES = "localhost,127.0.0.1,::1"
_ALL_IPV4 = "0.0.0.0"
_MOST_FILES = 65_536  # not more, because some programs allocate a table with an entry for each file they may open
_MOST_FILES_MACOS = 10_240  # macOS's OPEN_MAX; its kernel may refuse more, although the hard limit is unlimited
_BINARY_CHECK_TIMEOUT_S = 5.0


@contextmanager
def claim_ports(host: str, *, without: Collection[int | None] = ()) -> Iterator[range]:
    """Reserve a block of free ports, none of which is in `without`, until the context ends.

    This process listens on the first one, so that other servers see that the block is in use. Raises OSError if no
    block is free.

    All ports of the block are free on `host`, because HAProxy serves its statistics and metrics pages there. The other
    ports are used on the loopback address.
    """
    host = _ALL_IPV4 if ":" in host else host
    for _ in range(_ATTEMPTS):
        first = random.randrange(_FIRST_PORT, _LAST_PORT, _BLOCK)
        if not set(range(first, first + _BLOCK)).isdisjoint(without):
            continue
        claim = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with claim:
            try:
                claim.bind((host, first))
                claim.listen(1)  # without `listen`, another socket with SO_REUSEADDR could bind to this port too
            except OSError:
                continue
            if all(is_port_free(host, port) for port in range(first + 1, first + _BLOCK)):
                yield range(first, first + _BLOCK)
                return
    raise OSError(f"no {_BLOCK} consecutive free ports between {_FIRST_PORT} and {_LAST_PORT}")


def is_port_free(host: str, port: int) -> bool:
    """Whether a server could listen on this address now."""
    try:
        _try_to_bind(host, port)
    except OSError:
        return False
    return True


def require_free_ports(host: str, port: int, *, metrics_host: str, metrics_port: int | None) -> None:
    """Raise ConfigError if the server or, on another port, its metrics page cannot listen there.

    If `metrics_port` is None, Ray chooses a free one.
    """
    require_free_port(host, port)
    option, field = "--metrics-port (STABLE_AUDIO_METRICS_PORT)", "metrics.port"
    if metrics_port == port:
        raise ConfigError(f"the server needs port {port}; choose another for the metrics with {option}", field=field)
    if metrics_port is not None:
        require_free_port(metrics_host, metrics_port, option=option, field=field)


def require_free_port(host: str, port: int, *, option: str = "--port (PORT=) or --host", field: str = "port") -> None:
    """Raise ConfigError if the server cannot listen on this address. The message advises to change `option`."""
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
        # A port whose last connection is in the TCP state TIME_WAIT counts as free, because a server can listen on it.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
    """Raise the soft limit of open files to the hard limit, but at most to `_MOST_FILES`.

    Each connection needs an open file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except ValueError:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, _MOST_FILES_MACOS), hard))


def base_environment(settings: Settings) -> dict[str, str]:
    """Return the environment variables that every embedded Ray needs, with or without HAProxy.

    The variables set an access token, turn off usage statistics, and make health checks and the stop of Ray fast.
    """
    return {
        # With 0, Ray's internal ports listen on loopback; with 1, on all interfaces. Despite its name, the variable has
        # this effect on Linux too.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if is_loopback(settings.metrics.host) else "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Without this, a thread of Ray Serve that calls Ray after Ray was stopped would start a new Ray instance.
        "RAY_ENABLE_AUTO_CONNECT": "0",
        "RAY_DEDUP_LOGS": "0",
        # Otherwise, Ray may print at the stop that a call of Ray Serve's controller failed and is tried again.
        "RAY_enable_output_error_log_if_still_retry": "0",
        # Ray does not limit the log files of replicas by default.
        "RAY_ROTATION_MAX_BYTES": "50000000",
        "RAY_ROTATION_BACKUP_COUNT": "2",
        "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "stable_audio_serve.serving.logs.tidy_controller_log",
        # Ray's memory monitor is off: it would kill replicas if other programs used too much memory.
        "RAY_memory_monitor_refresh_ms": "0",
        # Otherwise gRPC would send Ray's local metrics traffic through the proxy for outgoing connections.
        "no_proxy": ",".join(filter(None, (os.environ.get("no_proxy", os.environ.get("NO_PROXY")), _LOCAL_NAMES))),
        # Kill a replica that fails its health check immediately, without a grace period.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # Ray writes HAProxy's configuration, which contains an arrow, with the encoding of the locale.
        "PYTHONUTF8": "1",
        # Ray preloads this library from its package. The loader would split a path with spaces or colons.
        **({"RAY_JEMALLOC_LIB_PATH": ""} if re.search(r"[\s:]", sys.prefix) else {}),
        "RAY_worker_niceness": "0",  # normal priority; by default, Ray gives its worker processes a low priority
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
        # Ray Serve replaces a proxy after three failed health checks in a row. The check of a dead proxy fails at once,
        # so a short period helps. The check of a slow proxy fails after the timeout, which is long.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.3",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    }


def color_environment() -> dict[str, str]:
    """Return the variable that turns off Ray's colour codes, or no variable if the output goes to a terminal."""
    return {} if sys.stdout.isatty() and sys.stderr.isatty() else {"RAY_COLOR_PREFIX": "0"}


def haproxy_environment(ports: range, directory: Path, *, host: str, settings: Settings) -> dict[str, str]:
    """Return the environment variables with which Ray Serve uses HAProxy as its proxy.

    HAProxy uses the ports in `ports` and writes its files to `directory`. It listens on `host`. Ray Serve listens on
    loopback, so that clients cannot bypass HAProxy. Raises OSError if HAProxy is not installed or cannot run.
    """
    _, stats, metrics, fallback_http, fallback_grpc, first_replica = ports[:6]
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": _program(directory),
        haproxy.BINARY: haproxy.find_binary(),
        haproxy.PUBLIC_HOST: host,
        haproxy.HEADER_TIMEOUT_S: str(settings.proxy.header_timeout_s),
        haproxy.IDLE_TIMEOUT_S: str(settings.proxy.idle_timeout_s),
        haproxy.METRICS_HOST: settings.metrics.host,
        # When the set of replicas changes, HAProxy is reloaded: a new process starts, and the old one finishes its
        # requests. Until then, the old process may forward requests to the port of a stopped replica. Therefore Ray
        # Serve gives no new replica that port before the old process has ended.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(settings.api.max_deadline_s)),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),  # needed even if the metrics are disabled
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        # Ray Serve's Python proxy, to which HAProxy sends requests while no ingress replica answers.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_replica),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.stop),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
    }


def _program(directory: Path) -> str:
    """Write a script to `directory` that runs `serving.haproxy`, and return its path. Ray runs the script as HAProxy.

    The script starts Python without site packages, which is faster. If programs cannot run in `directory`, returns the
    path of the installed program `stable-audio-haproxy` instead. Raises OSError if that is not installed either.
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
