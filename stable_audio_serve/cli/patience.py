"""Messages on standard error while a command waits for its server, or is about to try again."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import httpx

    from stable_audio_serve.core.errors import StableAudioError

_SILENT_S = 1.5


class Patience:
    """Names the server when a request has had no answer for 1.5 s. A context manager, which ends the timer."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Patience:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def begin(self, request: httpx.Request) -> None:
        """Called with each request that is sent."""
        self._stop()
        server = request.url.copy_with(path="/", query=None)
        self._timer = threading.Timer(_SILENT_S, self._say, [f"waiting for the server {server}"])
        self._timer.daemon = True
        self._timer.start()

    def end(self, _: httpx.Response) -> None:
        """Called when the headers of its answer are there."""
        self._stop()

    def retry(self, failure: StableAudioError, pause_s: float) -> None:
        """Called when a request failed and is to be sent again after a pause."""
        self._stop()
        self._say(f"{failure.message}; trying again in {pause_s:.1f} s")

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _say(self, sentence: str) -> None:
        from stable_audio_serve.cli.job_report import plain

        if not self._quiet:
            typer.echo(plain(sentence, limit=None), err=True)
