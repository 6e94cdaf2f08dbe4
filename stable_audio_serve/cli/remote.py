"""Options and a client for commands that call a running server.

The API key comes from the environment or from a file. It is not an option, because every user of the machine can read
command lines.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stable_audio_serve.cli.messages import describe_os_error, fail, plain, plain_errors

if TYPE_CHECKING:
    import httpx

    from stable_audio_serve.client import Client
    from stable_audio_serve.core.errors import StableAudioError

UrlOption = Annotated[
    str | None, typer.Option("--url", help="The server; default: STABLE_AUDIO_URL, else http://127.0.0.1:8000.")
]
KeyFileOption = Annotated[
    Path | None, typer.Option("--key-file", help="File with an API key; default: the key in STABLE_AUDIO_API_KEY.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]

_TIMEOUT_S = 10.0
_MOST_REFUSED = 2  # retries after a refused connection, because a restarting server listens again within seconds
_SILENT_S = 1.5


class WaitMessages:
    """Prints messages on standard error: after 1.5 s without an answer, and before each retry."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._timer: threading.Timer | None = None

    def begin(self, request: httpx.Request) -> None:
        """Start the timer that prints "waiting for the server". httpx calls this before each request."""
        self.end()
        server = request.url.copy_with(path="/", query=None, username=None, password=None)
        self._timer = threading.Timer(_SILENT_S, self._print, [f"waiting for the server {server}"])
        self._timer.daemon = True
        self._timer.start()

    def end(self, _: httpx.Response | None = None) -> None:
        """Stop the timer. httpx calls this when a response begins. It is also called when the client closes."""
        if self._timer is not None:
            self._timer.cancel()

    def retry(self, failure: StableAudioError, pause_s: float) -> None:
        """Print why a request failed and when it is sent again. The client calls this before each pause."""
        self.end()
        self._print(f"{failure.message}; trying again in {pause_s:.1f} s")

    def _print(self, sentence: str) -> None:
        if not self._quiet:
            typer.echo(plain(sentence), err=True)


@contextmanager
def connected(url: str | None, key_file: Path | None) -> Iterator[Client]:
    """Open a client without retries, for operators' commands.

    Expected errors in the block end the command, and so do answers of another format, such as those of another server.
    """
    from stable_audio_serve.core.errors import GenerationError

    with plain_errors(), open_client(url, key_file, most_retries=0, timeout_s=_TIMEOUT_S) as client:
        try:
            yield client
        except (AttributeError, KeyError, TypeError) as error:
            raise GenerationError(f"the server's answer cannot be understood: {error}") from error


@contextmanager
def open_client(
    url: str | None,
    key_file: Path | None,
    *,
    quiet: bool = False,
    most_retries: int | None = None,
    timeout_s: float | None = None,
) -> Iterator[Client]:
    """Open a client. Unless `quiet` is true, it prints to standard error when it waits or sends a request again."""
    import httpx

    from stable_audio_serve.client import Client, Retries
    from stable_audio_serve.client.operations import TIMEOUT, make_http
    from stable_audio_serve.core.settings_sources import load_environment

    messages = WaitMessages(quiet=quiet)
    retries = Retries(most_refused=_MOST_REFUSED, on_pause=messages.retry)
    if most_retries is not None:
        retries = replace(retries, most=most_retries)
    hooks: dict[str, list[Any]] = {"request": [messages.begin], "response": [messages.end]}
    with plain_errors():
        load_environment(os.environ)  # from the same `.env` as the server
        http = make_http(httpx.Client, timeout=timeout_s or TIMEOUT, event_hooks=hooks)
    client = Client(url, api_key=_read_key(key_file), retries=retries, http=http)
    try:
        with client:
            yield client
    finally:
        messages.end()


def ask(client: Client, what: str, **options: Any) -> Any:
    """Send a request and return the JSON of the answer. `what` has the method and the path, such as "GET /jobs".

    Raises errors of `core.errors`.
    """
    from stable_audio_serve.client.calls import Call

    method, path = what.split()
    return client.send(Call(method, path, lambda answer: answer.json(), options))


def _read_key(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        key = file.read_text(encoding="utf-8-sig").strip()  # a byte order mark, if any, is left out
    except OSError as error:
        raise fail(f"--key-file: {describe_os_error(error)}") from error
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isascii() or not key.isprintable():
        raise fail(f"--key-file: {file} does not contain an API key")
    return key
