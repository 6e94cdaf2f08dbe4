"""What the commands that ask a running server have in common: which server, which key, and how they fail.

The key comes from the environment or a file, never from the command line, which every user of the machine can read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stable_audio_serve.cli.configuration import refusing
from stable_audio_serve.cli.endings import fail, said_plainly
from stable_audio_serve.cli.patience import Patience
from stable_audio_serve.cli.wording import describe_os_error

if TYPE_CHECKING:
    from stable_audio_serve.client import Client

UrlOption = Annotated[
    str | None, typer.Option("--url", help="The server; default: STABLE_AUDIO_URL, else http://127.0.0.1:8000.")
]
KeyFileOption = Annotated[
    Path | None, typer.Option("--key-file", help="File with an API key; default: the key in STABLE_AUDIO_API_KEY.")
]

_TIMEOUT_S = 10.0
_MOST_REFUSED = 2  # a server that is started again may listen a moment later


@contextmanager
def connected(url: str | None, key_file: Path | None) -> Iterator[Client]:
    """A client that tries once, for what operators ask. What goes wrong is one sentence and an exit code."""
    with said_plainly(), open_client(url, key_file, most_retries=0, timeout_s=_TIMEOUT_S) as client:
        yield client


@contextmanager
def open_client(
    url: str | None,
    key_file: Path | None,
    *,
    quiet: bool = False,
    most_retries: int | None = None,
    timeout_s: float | None = None,
) -> Iterator[Client]:
    """A client of the server, which says on standard error what keeps it waiting, unless it is to be quiet."""
    import httpx

    from stable_audio_serve.client import Client, Retries
    from stable_audio_serve.client.operations import TIMEOUT

    load_dotenv()
    with Patience(quiet=quiet) as patience:
        retries = Retries(most_refused=_MOST_REFUSED, on_pause=patience.retry)
        if most_retries is not None:
            retries = replace(retries, most=most_retries)
        http = httpx.Client(
            timeout=timeout_s or TIMEOUT, event_hooks={"request": [patience.begin], "response": [patience.end]}
        )
        try:
            client = Client(url, api_key=_read_key(key_file), retries=retries, http=http)
        except ValueError as error:
            raise fail(f"--url (STABLE_AUDIO_URL): {error}") from error
        with client:
            yield client


def ask(client: Client, what: str, **options: Any) -> Any:
    """Returns the JSON of a successful answer to `what`, a method and a path. Raises errors of `core.errors`."""
    from stable_audio_serve.client.calls import Call

    method, path = what.split()
    return client.send(Call(method, path, lambda answer: answer.json(), options))


def load_dotenv() -> None:
    """Add the variables of the nearest `.env`, as the server does."""
    import os

    from stable_audio_serve.core.settings_sources import load_environment

    with refusing():
        load_environment(os.environ)


def _read_key(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise fail(f"--key-file: {describe_os_error(error)}") from error
    except UnicodeDecodeError as error:
        raise fail(f"--key-file: {file} holds no API key") from error
    if not key or not key.isascii() or not key.isprintable():
        raise fail(f"--key-file: {file} holds no API key")
    return key
