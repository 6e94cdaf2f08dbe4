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
from stable_audio_serve.cli.endings import fail

if TYPE_CHECKING:
    from stable_audio_serve.client import Client

UrlOption = Annotated[
    str | None, typer.Option("--url", help="The server; default: STABLE_AUDIO_URL, else http://127.0.0.1:8000.")
]
KeyFileOption = Annotated[
    Path | None, typer.Option("--key-file", help="File with an API key; default: the key in STABLE_AUDIO_API_KEY.")
]

# Exit codes, for scripts; 2 is wrong usage, as everywhere.
FAILED, UNREACHABLE, KEY_REFUSED = 1, 3, 4

_TIMEOUT_S = 10.0


@contextmanager
def connected(url: str | None, key_file: Path | None) -> Iterator[Client]:
    """A client that tries once, for what operators ask. What goes wrong is one sentence and an exit code."""
    import httpx

    from stable_audio_serve.client import Retries
    from stable_audio_serve.core.errors import ForbiddenError, StableAudioError, UnauthorizedError, UnreachableError

    try:
        with open_client(url, key_file, retries=Retries(most=0), http=httpx.Client(timeout=_TIMEOUT_S)) as client:
            yield client
    except UnreachableError as error:
        raise fail(error.message, code=UNREACHABLE) from error
    except (UnauthorizedError, ForbiddenError) as error:
        hint = "" if isinstance(error, ForbiddenError) else "; set STABLE_AUDIO_API_KEY or --key-file"
        raise fail(f"{error.message}{hint}", code=KEY_REFUSED) from error
    except StableAudioError as error:
        raise fail(error.message, code=FAILED) from error


def open_client(url: str | None, key_file: Path | None, **options: Any) -> Client:
    """Returns a client of the server; `options` are those of `Client`."""
    from stable_audio_serve.client import Client

    load_dotenv()
    try:
        return Client(url, api_key=_read_key(key_file), **options)
    except ValueError as error:
        raise fail(f"--url (STABLE_AUDIO_URL): {error}", code=2) from error


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
        raise fail(f"--key-file: {file} cannot be read: {error}", code=2) from error
    if not key or not key.isascii() or not key.isprintable():
        raise fail(f"--key-file: {file} holds no API key", code=2)
    return key
