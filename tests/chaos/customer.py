"""The client of a chaos run, which submits jobs to the server and checks their audio. A planned job is an `Order`.

If a request gets no answer, the client sends it again with the same idempotency key. The client polls each job until
the job ends, and records each step in a ledger.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import soundfile

from tests.chaos import dialects
from tests.chaos.ledger import Ledger
from tests.chaos.orders import Order

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 2.0
_POLL_S = 0.5
_TRANSIENT = (429, 503)
_FAILING = (*_TRANSIENT, 500, 502, 504)


class WrongError(Exception):
    """The server gave an answer that is a fault: an unexpected status, or wrong audio."""


class NoAnswerError(Exception):
    """A request got no answer, or an error that a retry may avoid.

    The server may have carried out the request anyway.
    """


@dataclass(frozen=True, slots=True)
class Customer:
    """Submits planned jobs (orders) through `http`. Each order has its own webhook path below `webhooks_url`."""

    http: httpx.AsyncClient
    ledger: Ledger
    webhooks_url: str

    async def run(self, order: Order, *, give_up_s: float) -> None:
        """Submit an order, wait for its job and check the audio. Records each step and any fault in the ledger."""
        try:
            async with asyncio.timeout(give_up_s):
                job = await self._submit(order)
                if order.is_repeated:
                    await self._submit(order)
                await self.fetch(order, job)
        except TimeoutError:
            self.ledger.write("wrong", order.number, why=f"not over after {give_up_s:g} s")
        except WrongError as error:
            self.ledger.write("wrong", order.number, why=str(error))

    async def fetch(self, order: Order, job: str) -> bytes | None:
        """Wait until the job ends, then download and check its audio. Returns the audio, or None if the job failed.

        Raises WrongError.
        """
        look = await self._end(order, job)
        if look.state == "failed":
            self.ledger.write("failed", order.number, job=job, error=look.error)
            return None
        files = [(await self._send_until_answered(method="GET", url=look.file_url)).content for _ in range(2)]
        digests = [hashlib.sha256(file).hexdigest() for file in files]
        path = httpx.URL(look.file_url).path
        self.ledger.write("fetched", order.number, job=job, path=path, sha256=digests)
        _check_audio(files[0], order)
        return files[0]

    async def expected_audio(self, order: Order) -> bytes:
        """Generate an order's audio through the native API's synchronous route. Returns the file. Raises WrongError."""
        route = "variations" if order.kind == "variation" else "generations"
        sending = dialects.submission(order, webhook_url="") | {"url": f"/v1/audio/{route}", "headers": {}}
        return (await self._send_until_answered(**sending | {"method": "POST"})).content

    async def _submit(self, order: Order) -> str:
        sending = dialects.submission(order, webhook_url=f"{self.webhooks_url}/{order.number}")
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                reply = await self._send(**sending)
            except NoAnswerError as error:
                self.ledger.write("unanswered", order.number, why=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            self.ledger.write("accepted", order.number, status=reply.status_code, body=reply.text)
            try:
                return dialects.job_id(order, reply.json())
            except (ValueError, KeyError, TypeError) as error:
                raise WrongError(f"accepted without an id: {reply.status_code} {reply.text[:300]}") from error

    async def _end(self, order: Order, job: str) -> dialects.Look:
        """Poll the job until it ends. Returns its last state, with the URL of the audio file or the error."""
        while True:
            reply = await self._send_until_answered(method="GET", url=dialects.status_path(order, job))
            look = dialects.read_status(order, reply.json())
            if look.state == "succeeded" and not look.file_url:
                output = await self._send_until_answered(method="GET", url=dialects.result_path(job))
                return dialects.Look("succeeded", file_url=output.json()["audio_file"]["url"])
            if look.state != "waiting":
                return look
            await asyncio.sleep(_POLL_S)

    async def _send_until_answered(self, **request: Any) -> httpx.Response:
        """Send the request again and again until it is answered. Raises WrongError."""
        while True:
            with suppress(NoAnswerError):
                return await self._send(**request)
            await asyncio.sleep(_POLL_S)

    async def _send(self, **request: Any) -> httpx.Response:
        """Send the request once. Returns an answer with status 2xx.

        Otherwise raises NoAnswerError if a retry may succeed, and WrongError if not.
        """
        try:
            reply = await self.http.request(**request)
        except httpx.TransportError as error:
            raise NoAnswerError(repr(error)) from error
        if reply.is_success:
            return reply
        if self._may_pass(reply):
            raise NoAnswerError(str(reply.status_code))
        raise WrongError(f"{request['method']} {request['url']} answered {reply.status_code}: {reply.text[:300]}")

    def _may_pass(self, reply: httpx.Response) -> bool:
        """Whether a retry may succeed: the server sent Retry-After, or the error comes from the object store."""
        if str(reply.url).startswith(str(self.http.base_url)):
            return reply.status_code in _TRANSIENT and "retry-after" in reply.headers
        return reply.status_code in _FAILING


def _check_audio(file: bytes, order: Order) -> None:
    """Raise WrongError unless the file is stereo WAV audio of the requested length and not silent."""
    try:
        audio, rate_hz = soundfile.read(io.BytesIO(file), always_2d=True)
    except soundfile.LibsndfileError as error:
        raise WrongError(f"not a WAV: {error}, {len(file)} bytes") from error
    if audio.shape[1] != 2 or abs(len(audio) - order.duration_s * rate_hz) > 1:
        raise WrongError(f"{audio.shape} samples at {rate_hz} Hz are not {order.duration_s} s of stereo")
    if not np.any(audio):
        raise WrongError("silence")
