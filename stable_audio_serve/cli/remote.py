"""What the commands that ask a running server have in common: which server, which key, and how they fail.

The key comes from the environment or a file, never from the command line, which every user of the machine can read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stable_audio_serve.cli.configuration import refusing
from stable_audio_serve.cli.endings import fail, said_plainly

if TYPE_CHECKING:
    from stable_audio_serve.client import Client

UrlOption = Annotated[
    str | None, typer.Option("--url", help="The server; default: STABLE_AUDIO_URL, else http://127.0.0.1:8000.")
]
KeyFileOption = Annotated[
    Path | None, typer.Option("--key-file", help="File with an API key; default: the key in STABLE_AUDIO_API_KEY.")
]

_TIMEOUT_S = 10.0


@contextmanager
def connected(url: str | None, key_file: Path | None) -> Iterator[Client]:
    """A client that tries once, for what operators ask. What goes wrong is one sentence and an exit code."""
    import httpx

    from stable_audio_serve.client import Retries

    with (
        said_plainly(),
        open_client(url, key_file, retries=Retries(most=0), http=httpx.Client(timeout=_TIMEOUT_S)) as client,
    ):
        yield client


def open_client(url: str | None, key_file: Path | None, **options: Any) -> Client:
    """Returns a client of the server; `options` are those of `Client`."""
    from stable_audio_serve.client import Client

    load_dotenv()
    try:
        return Client(url, api_key=_read_key(key_file), **options)
    except ValueError as error:
        raise fail(f"--url (STABLE_AUDIO_URL): {error}") from error


def ask(client: Client, what: str, **options: Any) -> Any:
    """Returns the JSON of a successful answer to `what`, a method and a path. Raises errors of `core.errors`."""
    from stable_audio_serve.client.calls import Call

    method, path = what.split()
    return client.send(Call(method, path, **options)).json()


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
    except (OSError, UnicodeDecodeError) as error:
        raise fail(f"--key-file: {file} cannot be read: {error}") from error
    if not key or not key.isascii() or not key.isprintable():
        raise fail(f"--key-file: {file} holds no API key")
    return key
